"""Decoded frames against those of the ffmpeg command, which `make_references.py` recorded; and damaged files."""

import functools
import io
import itertools
import json
import random
import re
import shutil
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorTrc
from frames_equal import assert_frames_equal
from make_references import CMYK, CMYK_CORNER, DAMAGED, DECODABLE, HEIGHT, NUM_BITS, NUM_FRAMES, RATE, SEEK_S
from PIL import Image

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, open_media, sparse_frames
from alpro_stream.media import frames as media_frames
from alpro_stream.media.tone import tone_mapped
from alpro_stream.stream.clips import FramesClip, VideoClip, build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.isolated import FrameChoice, IsolatedDecoder, IsolatedError
from alpro_stream.stream.view import View

HERE = Path(__file__).parent
REFERENCES = json.loads(HERE.joinpath("references.json").read_text())
SMALL = [name for name in REFERENCES if "huge" not in name]
SMALL_GENERATED = [name for name in SMALL if name.startswith("clips/")]
SIDE = 24
# Times are rounded to microseconds, by the command down and here to the nearest.
ROUNDING_S = 2e-6

REASONS = {
    "audio_only.mp4": "no video stream",
    "corrupted_frames.mp4": r"decoding failed after \d+ frames",
    "image_renamed.mp4": "not one of the accepted formats",
    "one_pixel.png": "not one of the accepted formats",
    "text_renamed.mp4": "no video container",
    "zero_bytes.mp4": "empty",
    "zero_duration_init_only.mp4": "holds no frame",
    "cmyk_image.jpg": "not one of the accepted formats",
    "truncated_image.jpg": "not one of the accepted formats",
}
"""Why the damaged files give no frames when they are taken for videos."""


def decoded(name, *, choose=None, start_s=None, **options):
    options = {"fps": 1000, "max_frames": 1000, "size": REFERENCES[name]["side"]} | options
    with open_media(HERE / name) as file:
        return sparse_frames(file, FrameConfig(**options), choose=choose, start_s=start_s)


@functools.cache
def expected_frames(name):
    """The frames that the reference has, by number."""
    side = REFERENCES[name]["side"]
    strip = cv2.imread(str(HERE / "frames" / f"{Path(name).name}.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    if strip.dtype == np.uint16:  # the command does not map tones; that is tested elsewhere
        strip = tone_mapped(strip, ColorTrc.SMPTE2084, ColorPrimaries.BT2020)
    return dict(zip(REFERENCES[name]["stored"], strip.reshape(-1, side, side, 3), strict=True))


def assert_expected(frames, name, numbers):
    """Each frame is the one of that number, as far as the reference has it."""
    known = [(frame, number) for frame, number in zip(frames, numbers, strict=True) if number in expected_frames(name)]
    assert known
    assert_frames_equal([frame for frame, _ in known], [expected_frames(name)[number] for _, number in known])


def number_shown(frame, turned):
    """The number of a generated frame, read from its pixels."""
    upright = np.rot90(frame, k=-turned // 90)
    rows = round(len(upright) * 16 / HEIGHT)
    columns = [int((bit + 0.5) * upright.shape[1] / NUM_BITS) for bit in range(NUM_BITS)]
    return sum((upright[rows // 2, column].mean() > 128) << bit for bit, column in enumerate(columns))


@pytest.fixture
def quick_only(monkeypatch):
    """Falling back to decoding everything, which would hide what the quick way does wrong, fails."""

    def refuse(*_):
        raise AssertionError("fell back to decoding everything")

    monkeypatch.setattr(media_frames, "_decode_all", refuse)


@pytest.mark.parametrize("way", ["quick", "everything"])
@pytest.mark.parametrize("name", REFERENCES)
def test_every_frame_is_that_of_the_ffmpeg_command(name, way, request, monkeypatch):
    if way == "quick":
        request.getfixturevalue("quick_only")
    else:
        monkeypatch.setattr(media_frames, "read_timeline", lambda *_: None)  # as where the container tells no times
    reference = REFERENCES[name]
    found = decoded(name)
    assert found.timestamps_s == pytest.approx(reference["times_s"], abs=ROUNDING_S)
    source = found.source
    assert [source.codec, [source.width, source.height]] == [reference["codec"], reference["size"]]
    assert source.num_frames == len(reference["times_s"])
    assert_frames_equal([found.frames[number] for number in reference["stored"]], [*expected_frames(name).values()])


@pytest.mark.parametrize("name", SMALL_GENERATED)
def test_frames_show_their_own_numbers(name):
    """What this decoder and the command might get wrong alike is told by the pixels."""
    first = round(float(SEEK_S.get(Path(name).name, 0)) * RATE)
    numbers = [number_shown(frame, REFERENCES[name]["turned"]) for frame in decoded(name).frames]
    assert numbers == list(range(first, first + len(numbers)))
    assert len(numbers) == (14 if "truncated" in name else NUM_FRAMES - first)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_frame_before_or_after_is_not_taken_for_equal(name):
    for one, other in itertools.pairwise(expected_frames(name).values()):
        with pytest.raises(AssertionError, match="frame 0 differs"):
            assert_frames_equal([one], [other])


@pytest.mark.parametrize("fps", [1, 3, 7.5])
@pytest.mark.parametrize("name", SMALL)
def test_frames_on_display_at_the_grid_times(name, fps, quick_only):
    found, times = decoded(name, fps=fps), REFERENCES[name]["times_s"]
    # Points of time until the video ends; at each the last frame that is not later is on display.
    points = itertools.takewhile(lambda point: point < found.source.duration_s, (i / fps for i in itertools.count()))
    numbers = sorted({int(np.searchsorted(times, point + ROUNDING_S, side="right")) - 1 for point in points})
    assert found.timestamps_s == pytest.approx([times[number] for number in numbers], abs=ROUNDING_S)
    assert_expected(found.frames, name, numbers)


@pytest.mark.parametrize("name", SMALL)
def test_repeated_frames_and_any_order(name, quick_only):
    stored = REFERENCES[name]["stored"]
    middle = stored[len(stored) // 2]
    repeated = [stored[0], stored[0], middle, middle, middle, stored[-1], stored[-1]]
    assert_expected(decoded(name, choose=lambda _: repeated).frames, name, repeated)
    for number in random.Random(name).sample(stored, min(len(stored), 8)):
        assert_expected(decoded(name, choose=lambda _, number=number: [number]).frames, name, [number])


@pytest.mark.parametrize("name", SMALL_GENERATED)
def test_a_part_that_is_reached_by_seeking(name, monkeypatch):
    for module in ("decode", "timeline"):
        monkeypatch.setattr(f"alpro_stream.media.{module}.MIN_SEEK_S", Fraction(1, 10))
    times = REFERENCES[name]["times_s"]
    for start_s in (0.29, 0.7, 1.1):
        first = int(np.searchsorted(times, start_s, side="right")) - 1
        assert_expected(decoded(name, start_s=start_s).frames, name, range(first, len(times)))


def test_every_damaged_file_is_accounted_for():
    assert {*REASONS} | DECODABLE == {*DAMAGED}
    assert {path.name for path in HERE.joinpath("damaged").iterdir()} == {*DAMAGED}


@pytest.mark.parametrize("name", REASONS)
def test_damaged_files_are_refused_with_a_reason(name):
    with pytest.raises(MediaError, match=REASONS[name]), open_media(HERE / "damaged" / name) as file:
        sparse_frames(file, FrameConfig())


def test_a_name_with_spaces_and_letters_of_other_scripts(tmp_path):
    path = tmp_path / "name with spaces ünïcödé 手 (1).mp4"
    shutil.copyfile(HERE / "clips/h264_closed_gop.mp4", path)
    with open_media(path) as file:
        found = sparse_frames(file, FrameConfig(fps=1000, max_frames=1000, size=SIDE))
    assert_frames_equal(found.frames, [*expected_frames("clips/h264_closed_gop.mp4").values()])


def uniform(num_frames):
    """The frames that the `uniform` policy takes of all: the middles of four equal parts."""
    return [(2 * part + 1) * num_frames // 8 for part in range(4)]


@pytest.fixture(scope="module")
def isolated():
    with closing(IsolatedDecoder(2, 30.0)) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def decoder():
    with closing(build_clip_decoder(DecodeConfig(num_workers=1), SIDE, max_frames=4, device_id=None)) as decoder:
        yield decoder


def choice_of(size=SIDE):
    return FrameChoice(4, "uniform", (0, "source", 0, "key"), FrameConfig(fps=1000, max_frames=1000, size=size))


def test_the_stream_shows_the_same_frames_of_stored_videos_among_damaged_ones(decoder):
    names = [*REFERENCES, *(f"damaged/{name}" for name in REASONS)]
    random.Random(0).shuffle(names)
    clips = [VideoClip(HERE.joinpath(name).read_bytes(), choice_of(), View()) for name in names]
    pixels = decoder.empty(len(clips), 4)
    errors = decoder.decode(clips, pixels)
    for name, error, shown in zip(names, errors, pixels.numpy(), strict=True):
        if name in REFERENCES:
            assert error is None, f"{name}: {error}"
            if "huge" not in name:  # its reference has another size
                assert_expected(shown, name, uniform(len(REFERENCES[name]["times_s"])))
        else:
            assert error.cause == "decode"
            assert re.search(REASONS[Path(name).name], error.reason), f"{name}: {error}"


def noisy(data, start, end, seed):
    """The bytes with noise from one share of them to another."""
    start, end = int(len(data) * start), int(len(data) * end)
    return data[:start] + random.Random(seed).randbytes(end - start) + data[end:]


def cut(data, share):
    return data[: int(len(data) * share)]


def test_damage_to_any_codec_ends_with_frames_or_a_reason(isolated):
    """Never a crash, nor a hang; and the same every time."""
    data = [HERE.joinpath(name).read_bytes() for name in SMALL_GENERATED]
    damaged = [noisy(one, 0.45, 0.6, seed) for seed, one in enumerate(data)] + [cut(one, 0.6) for one in data]
    for found, again in zip(
        *(isolated.decode_videos([(one, choice_of()) for one in damaged]) for _ in "12"), strict=True
    ):
        if isinstance(found, IsolatedError):
            assert (found.cause, found.reason) == (again.cause, again.reason)
            assert found.cause == "decode"
            assert found.reason
        else:
            np.testing.assert_array_equal(found, again)
            assert np.shape(found) == (4, SIDE, SIDE, 3)


@pytest.mark.parametrize("name", SMALL_GENERATED)
def test_noise_in_the_middle_is_refused_or_costs_what_follows(name):
    """MP4 knows where each frame has to be. The others go on behind the damage, and the command does so too."""
    found = outcome(noisy(HERE.joinpath(name).read_bytes(), 0.45, 0.6, 0))
    if isinstance(found, MediaError):
        assert re.search(r"decoding failed after \d+ frames", str(found))
    else:
        assert not name.endswith((".mp4", ".mov"))
        assert_expected(found.frames[:5], name, range(5))
        assert len(found.frames) < NUM_FRAMES


def outcome(data):
    try:
        return sparse_frames(io.BytesIO(data), FrameConfig(fps=1000, max_frames=1000, size=SIDE))
    except MediaError as error:
        return error


def test_a_file_that_lost_its_index_is_refused():
    data = cut(HERE.joinpath("clips/h264_closed_gop.mp4").read_bytes(), 0.9)
    with pytest.raises(MediaError, match="no video container"):
        sparse_frames(io.BytesIO(data), FrameConfig())


def test_damaged_jpegs_through_the_stream(decoder):
    """What decodes is what Pillow or the ffmpeg command makes of the same bytes; the others cost themselves alone."""
    photo = HERE.joinpath("damaged/image_renamed.mp4").read_bytes()
    cmyk, truncated = (HERE.joinpath("damaged", name).read_bytes() for name in (CMYK, "truncated_image.jpg"))
    middle = slice(len(photo) // 2, len(photo) * 6 // 10)
    # Without markers: those end a file for some decoders.
    with_noise = photo[: middle.start] + noisy(photo, 0, 1, 3)[middle].replace(b"\xff", b"") + photo[middle.stop :]
    width, height = Image.open(io.BytesIO(photo)).size
    corner = (300, 40)

    def clip(jpeg, left, top, width, height):
        # Of the size of the output, so that nothing is resized.
        return FramesClip((jpeg,), (0,) * 4, View((left / width, top / height, SIDE / width, SIDE / height)))

    jpegs = {
        "photo": clip(photo, *corner, width, height),
        "truncated": clip(truncated, *corner, 970, 646),
        "cmyk": clip(cmyk, *CMYK_CORNER, 250, 305),
        "noise": clip(with_noise, *corner, width, height),
        "no end": clip(cut(photo, 0.7), *corner, width, height),
        "header": clip(noisy(photo, 0.0, 0.005, 1), *corner, width, height),
        "empty": clip(b"", *corner, width, height),
        "photo again": clip(photo, *corner, width, height),
    }
    pixels = decoder.empty(len(jpegs), 4)
    errors = dict(zip(jpegs, decoder.decode([*jpegs.values()], pixels), strict=True))
    assert {name for name, error in errors.items() if error} == {"truncated", "no end", "header", "empty"}
    assert all(error.cause == "decode" and error.reason for error in errors.values() if error)
    found = dict(zip(jpegs, pixels.numpy(), strict=True))
    assert not np.array_equal(*(square(jpegs[name].jpegs[0], *corner) for name in ("photo", "noise")))
    for name in ("photo", "noise", "photo again"):
        assert_frames_equal(found[name], [square(jpegs[name].jpegs[0], *corner)] * 4)
    expected = cv2.imread(str(HERE / f"frames/{CMYK}.png"))[..., ::-1]
    assert_frames_equal(found["cmyk"], [expected] * 4, atol=2)


def square(jpeg, left, top):
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return np.asarray(image)[top : top + SIDE, left : left + SIDE]
