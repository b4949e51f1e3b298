"""Decoding beside the run: the right pixels, and hangs and crashes that cost one sample."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from media_files import constant_rate, write_video
from open_files import open_files
from PIL import Image

from alpro_stream.errors import AlproError, MediaError
from alpro_stream.media import FrameConfig, sparse_frames
from alpro_stream.media import frames as media_frames
from alpro_stream.stream import isolated
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.isolated import FrameChoice, IsolatedDecoder, IsolatedError
from alpro_stream.stream.isolated_process import (
    Answer,
    PicturesRequest,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from alpro_stream.stream.seeds import Draws

VIDEOS = Path(__file__).resolve().parents[2] / "examples/clips/videos"
CLIPS = [VIDEOS / name for name in ("v005.mkv", "v015.mp4", "v020.mkv", "v043.avi", "v056.mov", "v060.webm")]
IDENTITY = (0, "source", 3, "key")
FRAMES = FrameConfig(fps=3, max_frames=16, size=64)

FAULTY = """
import os, signal, sys, time
from pathlib import Path
from alpro_stream.stream import isolated_process

decode_video = isolated_process._decode_video

def faulty(request, buffer):
    command = os.pread(buffer, 200, 0)
    if command.startswith(b"once:"):
        fault, marker = command.decode().split(":")[1:]
        first = not Path(marker).exists()
        Path(marker).touch()
        command = fault.encode() if first else Path(marker).with_name("clip").read_bytes()
        os.ftruncate(buffer, 0)
        os.pwrite(buffer, command, 0)
    if command == b"hang":
        while True:
            pass
    if command == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if command == b"slow":
        time.sleep(0.3)
        raise isolated_process.MediaError("slow")
    if command.startswith(b"lie:"):  # about the sizes of the pictures that it gives
        return isolated_process.Answer(sizes=eval(command[4:]))
    return decode_video(request, buffer)

isolated_process._decode_video = faulty
isolated_process.main(sys.argv[1:])
"""


def clip(num_frames=4, policy="headtail", frames=FRAMES):
    return FrameChoice(num_frames, policy, IDENTITY, frames)


def assert_pictures_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(one, other)


def jpeg(size=(80, 60)):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file.getvalue()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def causes(results):
    return [result.cause if isinstance(result, IsolatedError) else None for result in results]


@pytest.fixture(scope="module")
def decoder():
    with contextlib.closing(IsolatedDecoder(2, 60.0)) as decoder:
        yield decoder


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Makes decoders whose processes hang and crash where a video says so."""
    (tmp_path / "isolated_faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(isolated, "_PROCESS_MODULE", "isolated_faulty")
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(contextlib.closing(IsolatedDecoder(*arguments)))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "short.mp4", constant_rate(6, 6)).read_bytes()


@pytest.mark.parametrize("sampling", ["exact", "keyframes"])
def test_frames_are_those_that_sharding_would_store_bit_by_bit(decoder, sampling):
    frames = FRAMES.model_copy(update={"sampling": sampling})
    for policy, num_frames in (("headtail", 4), ("uniform", 5)):
        request = clip(num_frames, policy, frames=frames)
        found = decoder.decode_videos([(path.read_bytes(), request) for path in CLIPS])
        for path, pixels in zip(CLIPS, found, strict=True):
            with path.open("rb") as file:
                stored = sparse_frames(file, frames).frames
            chosen = choose_frames(len(stored), num_frames, policy, Draws("frames", *IDENTITY))
            assert_pictures_equal(pixels, [stored[index] for index in chosen])


def test_a_clip_of_few_frames_repeats_them(decoder, short):
    stored = sparse_frames(io.BytesIO(short), FRAMES).frames
    (pixels,) = decoder.decode_videos([(short, clip(num_frames=8))])
    assert len(stored) == 3
    assert_pictures_equal(pixels, [stored[index] for index in (0, 0, 0, 1, 1, 2, 2, 2)])


def test_where_everything_has_to_be_decoded_the_same_frames_are_chosen(monkeypatch):
    with CLIPS[0].open("rb") as file:
        stored = sparse_frames(file, FRAMES).frames
        monkeypatch.setattr(media_frames, "read_timeline", lambda *_: None)  # as where the container tells no times
        found = sparse_frames(file, FRAMES, choose=lambda num_stored: [0, 0, num_stored - 1])
    np.testing.assert_array_equal(np.stack(found.frames), np.stack(stored)[[0, 0, -1]])


@pytest.mark.parametrize(("size", "resize"), [(24, "square"), (32, "short_side")])
def test_pictures_of_a_video_have_the_size_of_those_that_are_stored(decoder, size, resize):
    frames = FrameConfig(fps=3, max_frames=4, size=size, resize=resize)
    ((*found,),) = decoder.decode_videos([(CLIPS[1].read_bytes(), clip(3, frames=frames))])
    with CLIPS[1].open("rb") as file:
        stored = sparse_frames(file, frames, choose=clip(3, frames=frames).among).frames
    assert_pictures_equal(found, stored)


def test_what_lies_after_the_frames_wanted_is_not_decoded(tmp_path):
    path = write_video(tmp_path / "clip.mp4", constant_rate(60, 10), width=320, height=240)
    contents = bytearray(path.read_bytes())
    damage = len(contents) * 7 // 10
    contents[damage : damage + 2000] = b"\xff" * 2000
    with pytest.raises(MediaError):
        sparse_frames(io.BytesIO(contents), FrameConfig(fps=10, size=64))
    asked = []
    found = sparse_frames(
        io.BytesIO(contents), FrameConfig(fps=10, size=64), choose=lambda num: asked.append(num) or [0, 5, 5]
    )
    assert asked == [60]
    assert found.timestamps_s == (0.0, 0.5, 0.5)
    assert found.frames[1] is found.frames[2]


def test_results_come_in_the_order_of_the_samples(decoder, short):
    videos = [(CLIPS[0].read_bytes(), clip()), (b"", clip()), (short, clip()), (b"text", clip()), (short, clip())]
    found = decoder.decode_videos(videos)
    assert causes(found) == [None, "decode", None, "decode", None]
    assert "empty" in found[1].reason
    assert "no video container" in found[3].reason
    assert not np.array_equal(found[0], found[2])
    assert_pictures_equal(found[2], found[4])
    assert decoder.decode_videos([]) == []


def damaged(contents, seed):
    """The video with noise in several places."""
    random = np.random.default_rng(seed)
    contents = bytearray(contents)
    for position in random.integers(0, len(contents) - 64, 8):
        contents[position : position + 64] = random.bytes(64)
    return bytes(contents)


def test_damaged_videos_give_pixels_or_an_error(decoder):
    contents = [CLIPS[2].read_bytes(), CLIPS[3].read_bytes()]
    videos = [damaged(contents[seed % 2], seed) for seed in range(12)]
    videos += [each[: len(each) // 2] for each in contents]
    found = decoder.decode_videos([(video, clip()) for video in videos])
    assert {type(result) for result in found} == {list, IsolatedError}
    assert all(np.stack(result).shape == (4, 64, 64, 3) for result in found if isinstance(result, list))
    assert all(result.reason for result in found if isinstance(result, IsolatedError))


@pytest.mark.parametrize("method", ["try_pictures", "decode_pictures"])
def test_pictures_are_decoded_to_their_end(decoder, method):
    fine = jpeg()
    damaged_data = b"\xff\xd8\xff" + bytes(100)
    samples = [[fine, fine], [fine, fine[:-200]], [], [b""], [fine, b"text", fine], [damaged_data], [fine]]
    found = getattr(decoder, method)(samples)
    assert causes(found) == [None, "decode", None, "decode", "decode", "decode", None]
    assert found[1].reason.startswith("frame 1 of 2: the image cannot be decoded: image file is truncated")
    assert found[3].reason == "frame 0 of 1: it is empty"
    assert found[4].reason == "frame 1 of 3: no image: expected JPEG, PNG, WEBP, BMP, GIF"


def test_pictures_come_at_their_own_size(decoder):
    """Without loss, so that it is seen that each is the one that was sent."""
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((1, 1), (30, 41), (41, 30))]
    files = [png(picture) for picture in pictures]
    first, second, third = decoder.decode_pictures([files, [files[2], files[2]], []])
    assert_pictures_equal(first, pictures)
    assert_pictures_equal(second, [pictures[2]] * 2)
    assert third == []
    assert all(picture.flags.writeable and picture.flags.c_contiguous for picture in first)
    # A large one in between, so that what is left of it would be seen.
    (large,), again = decoder.decode_pictures([[png(np.full((500, 400, 3), 7, np.uint8))], files])
    assert (large == 7).all()
    assert_pictures_equal(again, pictures)
    assert_pictures_equal(first, pictures)


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO"])
def test_the_formats_of_image_collections_are_decoded(decoder, name):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(file, name)
    (found,) = decoder.decode_pictures([[file.getvalue()]])
    if name in ("TIFF", "ICO"):
        assert causes([found]) == ["decode"]
    else:
        assert_pictures_equal(found, [np.full((8, 8, 3), (200, 0, 0))] if name != "WEBP" else found)
        assert found[0].shape == (8, 8, 3)


def test_a_picture_of_too_many_pixels_is_refused(decoder):
    (found,) = decoder.decode_pictures([[png(np.zeros((6001, 6000, 3), np.uint8))]])
    assert causes([found]) == ["decode"]
    assert "6000 x 6001 pixels, more than the limit of 36000000" in found.reason


def test_too_much_memory_is_an_error_of_the_sample():
    with contextlib.closing(IsolatedDecoder(1, 60.0, memory_mb=200)) as decoder:
        large = png(np.zeros((5000, 5000, 3), np.uint8))
        found = decoder.decode_pictures([[large] * 4, [jpeg()]])
        assert causes(found) == ["decode", None]
        assert "200 MiB" in found[0].reason


def test_a_process_that_lies_about_its_pictures_has_crashed(faulty, short):
    """No memory is taken for what it says, and the run goes on."""
    lies = [((1 << 20, 1 << 20),) * 4, ((64, 64),) * 3]  # 12 TiB; one less than was asked for
    # As long as the pixels of four pictures would be.
    videos = [f"lie:{sizes!r}".encode().ljust(4 * 64 * 64 * 3) for sizes in lies]
    found = faulty(2, 30.0).decode_videos([(video, clip()) for video in (*videos, short)])
    assert causes(found) == ["crash"] * 2 + [None]
    assert [error.reason for error in found[:2]] == [
        "the process that decodes it gave a wrong answer (pixels are missing), 2 times",
        "the process that decodes it gave a wrong answer (not what was asked for), 2 times",
    ]


def test_a_video_that_hangs_costs_less_than_two_deadlines_and_the_others_go_on(faulty, short):
    decoder = faulty(2, 1.0)
    started = time.monotonic()
    decoder.decode_videos([(short, clip())] * 4)
    up = time.monotonic()
    found = decoder.decode_videos([(b"hang", clip()), *[(short, clip())] * 4])
    # Whatever is more than two deadlines is for the start of a process, which on a busy machine is any time.
    assert 1.75 <= time.monotonic() - up < 2.0 + 5 * (up - started)
    assert causes(found) == ["deadline", None, None, None, None]
    assert found[0].reason == "it took more than 0.75 s (deadline 1 s), 2 times"
    assert causes(decoder.decode_videos([(short, clip())] * 2)) == [None, None]


def test_a_video_that_crashes_every_process_is_an_error(faulty, short):
    decoder = faulty(1, 30.0)
    found = decoder.decode_videos([(short, clip()), (b"crash", clip()), (short, clip())])
    assert causes(found) == [None, "crash", None]
    assert f"ended by signal {signal.SIGSEGV.value}, 2 times" in found[1].reason


@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_one_fault_is_forgiven(faulty, short, tmp_path, fault):
    (tmp_path / "clip").write_bytes(short)
    decoder = faulty(1, 4.0)
    once = f"once:{fault}:{tmp_path / 'marker'}".encode()
    (pixels, expected) = decoder.decode_videos([(once, clip()), (short, clip())])
    assert (tmp_path / "marker").exists()
    assert_pictures_equal(pixels, expected)


def test_the_deadline_is_that_of_each_sample_and_not_of_the_call(faulty):
    found = faulty(1, 1.0).decode_videos([(b"slow", clip())] * 5)  # 1.5 s
    assert [result.reason for result in found] == ["slow"] * 5


def test_a_stopped_process_is_replaced(short):
    before = set(psutil.Process().children())
    with contextlib.closing(IsolatedDecoder(1, 4.0)) as decoder:
        decoder.decode_videos([(short, clip())])
        (child,) = set(psutil.Process().children()) - before
        child.suspend()
        large = short + bytes(1 << 20)  # more than fits into a connection
        found = decoder.decode_videos([(large, clip())])
        assert causes(found) == [None]
        assert not child.is_running()


def test_processes_that_do_not_start_are_no_fault_of_the_sample(faulty, tmp_path, short):
    decoder = faulty(1, 30.0)
    (tmp_path / "isolated_faulty.py").write_text("raise SystemExit(7)")
    with pytest.raises(AlproError, match=r"could not be started: .* ended with status 7"):
        decoder.decode_videos([(short, clip())] * 3)
    (tmp_path / "isolated_faulty.py").write_text(FAULTY)
    assert causes(decoder.decode_videos([(short, clip())] * 3)) == [None] * 3


def test_it_can_be_called_again_after_the_thread_that_called_first_has_ended(short):
    with contextlib.closing(IsolatedDecoder(1, 30.0)) as decoder:
        found = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: found.extend(decoder.decode_videos([(short, clip())])))
            thread.start()
            thread.join()
        found += decoder.decode_videos([(short, clip())])
    assert causes(found) == [None] * 3


def test_closing_twice_leaves_no_process_and_no_open_file(short):
    before, opened = set(psutil.Process().children()), open_files()
    decoder = IsolatedDecoder(2, 30.0)
    assert not set(psutil.Process().children()) - before  # none is started before it is needed
    decoder.decode_videos([(short, clip())] * 2)
    assert len(set(psutil.Process().children()) - before) == 2
    decoder.close()
    decoder.close()
    assert not set(psutil.Process().children()) - before
    assert not open_files() - opened
    with pytest.raises(ValueError, match="closed"):
        decoder.try_pictures([[jpeg()]])


RUN = """
from alpro_stream.media import FrameConfig
from alpro_stream.stream import isolated

def clip():
    return isolated.FrameChoice(4, "uniform", (), FrameConfig(size=64))

isolated._PROCESS_MODULE = "isolated_faulty"
decoder = isolated.IsolatedDecoder(2, 100.0)
decoder.decode_videos([(b"text", clip())] * 2)
print("up", flush=True)
decoder.decode_videos([(b"hang" if number else bytes(1 << 22), clip()) for number in range(4)])
"""


@pytest.mark.usefixtures("faulty")
def test_a_killed_run_leaves_no_process_and_no_file(tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, env=environment, cwd=folder) as run:
        assert run.stdout.readline() == b"up\n"
        time.sleep(0.3)
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) == 2
        run.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "request_",
    [
        FrameChoice(4, "headtail", (2**60, "k\udcffy", -1), FRAMES),
        FrameChoice(1, "uniform", (), FrameConfig()),
        PicturesRequest((5, 0, 2**40), True),
        PicturesRequest((), False),
    ],
)
def test_requests_stay_the_same_on_their_way(request_):
    assert decode_request(encode_request(request_)) == request_


@pytest.mark.parametrize("answer", [Answer("why"), Answer(sizes=((3, 4), (2**20, 1))), Answer(), Answer("k\udcffy\n")])
def test_answers_stay_the_same_on_their_way(answer):
    assert decode_answer(encode_answer(answer)) == answer


def test_a_long_reason_is_cut():
    assert decode_answer(encode_answer(Answer("why" * 10_000))) == Answer(("why" * 10_000)[:1000])


@pytest.mark.parametrize(
    "said",
    [b"", b"\xff", b"{}", b"[]", b'["why"]', b'[1, []]', b'["", [1]]', b'["", [[1]]]', b'["", [[0, 1]]]',
     b'["", [[-5, 1]]]', b'["", [[1, 2, 3]]]', b'["", [[1.5, 2]]]', b'["", [["1", 2]]]', b'["", [[1, 2], null]]'],
)  # fmt: skip
def test_what_is_no_answer_is_refused(said):
    with pytest.raises(ValueError, match=r"\w"):
        decode_answer(said)


def test_the_process_imports_no_torch():
    code = "import sys, alpro_stream.stream.isolated_process; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
