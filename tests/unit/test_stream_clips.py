"""Clips to pixels: what becomes of one depends on its own bytes alone, not on what was decoded before or beside it."""

import io
import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stream_jpegs import jpeg, waves, with_sampling, with_size
from stream_parts import Wrapped, stored_as, write_clips

from alpro_stream.errors import SampleError
from alpro_stream.media import FrameConfig, sparse_frames
from alpro_stream.stream.clips import ClipDecoder, FramesClip, VideoClip, build_clip_decoder, read_clip
from alpro_stream.stream.decode import DecodeConfig, FrameDecoder, FrameError, build_decoder
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import FrameChoice, IsolatedDecoder
from alpro_stream.stream.jpeg import read_header
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.stream.view import View, show
from alpro_stream.testing.shards import picture

VIDEO = (Path(__file__).resolve().parents[2] / "examples/clips/videos/v015.mp4").read_bytes()
STORED = FrameConfig(fps=1, max_frames=8, size=64)
SIZE = 48
VIEW = View((0.1, 0.1, 0.8, 0.8), flip=True)
ERASED = 77


@pytest.fixture(scope="module")
def frames():
    with closing(build_decoder(DecodeConfig(num_workers=2), SIZE, max_frames=16, device_id=None)) as frames:
        yield frames


@pytest.fixture(scope="module")
def isolated():
    with closing(IsolatedDecoder(1, 60.0)) as isolated:
        yield isolated


@pytest.fixture
def gauges():
    return Gauges()


@pytest.fixture
def decoder(frames, isolated, gauges):
    return ClipDecoder(frames, isolated, SIZE, gauges=gauges)


def clip(*jpegs, positions=None, view=VIEW):
    return FramesClip(jpegs, tuple(range(len(jpegs))) if positions is None else positions, view)


def video(data, num_frames=2, view=VIEW):
    return VideoClip(data, FrameChoice(num_frames, "headtail", (0, "x", 0, "key"), STORED), view)


def decode(decoder, clips, num_frames):
    """Causes by clip, None where there are pixels; the reasons; and the pixels."""
    out = decoder.empty(len(clips), num_frames).fill_(ERASED)
    errors = decoder.decode(clips, out)
    return [error and error.cause for error in errors], [error and error.reason for error in errors], out.numpy()


def shown(frames_HWC, view=VIEW):
    out = np.empty((len(frames_HWC), SIZE, SIZE, 3), np.uint8)
    for frame_HWC, own in zip(frames_HWC, out, strict=True):
        show(frame_HWC, view, own)
    return out


def by_pillow(*files, view=VIEW):
    return shown([np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files], view)


def test_room_for_pixels(decoder):
    room = decoder.empty(3, 2)
    assert (room.shape, room.dtype, room.device.type) == ((3, 2, SIZE, SIZE, 3), torch.uint8, "cpu")
    assert room.is_contiguous()
    assert not room.is_pinned()


def test_plain_frames_are_seen_through_the_view_of_their_clip(decoder, gauges):
    files = [jpeg(waves(70 + number, 60, number)) for number in range(6)]
    views = [View(), VIEW, View((0.2, 0.0, 0.5, 0.9), "bicubic", operations=(("rotate", 15.0),))]
    clips = [clip(*files[2 * row : 2 * row + 2], view=view) for row, view in enumerate(views)]
    causes, _, pixels = decode(decoder, clips, 2)
    assert causes == [None] * 3
    for row, view in enumerate(views):
        np.testing.assert_array_equal(pixels[row], by_pillow(*files[2 * row : 2 * row + 2], view=view))
    assert gauges.lap()["stream/fallbacks"] == 0


# Not for the fast decoders


def turned(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif)


PLAIN = jpeg(waves(70, 60))
UNUSUAL = {
    "PNG": stored_as(PLAIN, "PNG"),
    "WebP": stored_as(PLAIN, "WEBP", lossless=True),
    "progressive": stored_as(PLAIN, progressive=True),
    "CMYK": stored_as(PLAIN, mode="CMYK"),
    "sampled otherwise": with_sampling(jpeg(waves(64, 64), subsampling="4:4:4"), 0x22, 0x21, 0x11),
    "bytes behind its end": PLAIN + b"\0",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_pillows_pixels_and_counted(decoder, gauges, name):
    data = UNUSUAL[name]
    causes, _, pixels = decode(decoder, [clip(data, PLAIN), clip(PLAIN, PLAIN), clip(data, data)], 2)
    assert causes == [None] * 3
    np.testing.assert_array_equal(pixels[0], by_pillow(data, PLAIN))
    np.testing.assert_array_equal(pixels[1], by_pillow(PLAIN, PLAIN))
    np.testing.assert_array_equal(pixels[2], by_pillow(data, data))
    assert gauges.lap()["stream/fallbacks"] == 2  # clips, not frames


@pytest.mark.parametrize(("orientation", "num_quarters"), [(3, 2), (6, 3), (8, 1)])
def test_turned_pictures_are_upright(decoder, gauges, orientation, num_quarters):
    image = waves(70, 60)
    _, _, pixels = decode(decoder, [clip(turned(image, orientation)), clip(turned(image, 1))], 1)
    upright = np.array(Image.open(io.BytesIO(jpeg(image))))
    np.testing.assert_array_equal(pixels[0], shown([np.ascontiguousarray(np.rot90(upright, num_quarters))]))
    np.testing.assert_array_equal(pixels[1], shown([upright]))
    assert gauges.lap()["stream/fallbacks"] == 1


def test_unusual_frames_that_are_seen_several_times(decoder):
    files = [UNUSUAL["PNG"], UNUSUAL["progressive"], picture(3, 0, 64)]
    _, _, (pixels,) = decode(decoder, [clip(*files, positions=(0, 0, 1, 2, 2))], 5)
    np.testing.assert_array_equal(pixels, by_pillow(*files)[[0, 0, 1, 2, 2]])


# Frames that are seen several times


def test_a_frame_that_is_seen_several_times_is_decoded_once(frames, isolated):
    counts = []

    class Counted(Wrapped):
        def decode(self, requests, out_NHWC, rows):
            counts.append(len(requests))
            assert list(rows) == sorted(set(rows))
            return super().decode(requests, out_NHWC, rows)

    decoder = ClipDecoder(Counted(frames), isolated, SIZE)
    files = [picture(3, frame, 64) for frame in (0, 9)]
    clips = [clip(*files, positions=(0, 0, 1, 1)), clip(files[0], positions=(0, 0, 0, 0)), clip(*files, *files)]
    causes, _, pixels = decode(decoder, clips, 4)
    assert causes == [None] * 3
    assert counts == [2 + 1 + 4]
    first, second = by_pillow(*files)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(pixels[0], [first, first, second, second])
    np.testing.assert_array_equal(pixels[1], [first] * 4)
    np.testing.assert_array_equal(pixels[2], [first, second, first, second])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "train"
    write_clips(folder, [2, 1], lambda number: [picture(number, frame, 64) for frame in range((5, 2, 9)[number])], 64)
    (source,) = open_sources([SourceConfig(path=folder)])
    return source


def choice(num_frames, policy="uniform"):
    return FrameChoice(num_frames, policy, (1, "x"), STORED)


def test_each_stored_frame_is_read_once(source):
    """A clip of two frames for a model that takes five: the first half of them sees the first."""
    read = read_clip(source, source.shards[0].name, 1, "place", choice(5), VIEW)
    assert read.positions == (0, 0, 1, 1, 1)
    assert read.jpegs == (picture(1, 0, 64), picture(1, 1, 64))
    assert read.view == VIEW
    assert read.num_bytes == sum(map(len, read.jpegs))


@pytest.mark.parametrize("policy", ["uniform", "headtail"])
def test_the_chosen_frames_are_read_in_their_order(source, policy):
    read = read_clip(source, source.shards[1].name, 0, "place", choice(4, policy), VIEW)
    chosen = choice(4, policy).among(9)
    assert chosen == sorted(set(chosen))
    assert read.jpegs == tuple(picture(2, frame, 64) for frame in chosen)
    assert read.positions == (0, 1, 2, 3)


def test_a_clip_without_media_is_an_error(source, monkeypatch):
    monkeypatch.setattr(type(source.reader), "media_members", lambda *_: ())
    with pytest.raises(SampleError, match=r"place: .*no stored frame and no video; expected at least one video"):
        read_clip(source, source.shards[0].name, 0, "place", choice(4), VIEW)


# Videos


def test_a_video_is_its_sparse_frames_through_the_view(decoder, gauges):
    views = [View(), VIEW, View((0.25, 0.1, 0.5, 0.5), "bicubic", operations=(("shear_x", 0.15),))]
    clips = [video(VIDEO, 3, view) for view in views]
    causes, _, pixels = decode(decoder, clips, 3)
    assert causes == [None] * 3
    stored = sparse_frames(io.BytesIO(VIDEO), STORED, choose=clips[0].choice.among).frames
    for row, view in enumerate(views):
        np.testing.assert_array_equal(pixels[row], shown(stored, view))
    assert gauges.lap()["stream/fallbacks"] == 0


def test_videos_and_frames_together_keep_their_places(decoder):
    plain, unusual = clip(PLAIN, PLAIN), clip(UNUSUAL["PNG"], UNUSUAL["PNG"])
    clips = [plain, video(VIDEO), unusual, video(VIDEO[:3000]), video(b""), clip(PLAIN[:50], PLAIN), video(VIDEO)]
    causes, _, pixels = decode(decoder, clips, 2)
    assert causes == [None, None, None, "decode", "decode", "decode", None]
    np.testing.assert_array_equal(pixels[0], by_pillow(PLAIN, PLAIN))
    np.testing.assert_array_equal(pixels[2], by_pillow(UNUSUAL["PNG"], UNUSUAL["PNG"]))
    np.testing.assert_array_equal(pixels[1], pixels[6])
    assert not np.array_equal(pixels[1], pixels[0])
    assert decode(decoder, [], 2)[0] == []


def test_a_part_of_a_batch_is_written_and_nothing_else(decoder):
    batch = decoder.empty(5, 2).fill_(ERASED)
    clips = [clip(PLAIN, UNUSUAL["PNG"]), video(VIDEO), clip(PLAIN, positions=(0, 0))]
    assert decoder.decode(clips, batch[1:4]) == [None] * 3
    _, _, expected = decode(decoder, clips, 2)
    np.testing.assert_array_equal(batch[1:4], expected)
    assert (batch[[0, 4]] == ERASED).all()


# Damage


def damaged(number, rng):
    """A frame with one of several kinds of damage, each at a random place."""
    data = bytearray(picture(number, 0, 64))
    scan = len(read_header(bytes(data)).data)
    place = rng.randrange(scan, len(data) - 40)
    match number % 6:
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            data[place : place + 30] = bytes(30)
        case 2:
            data[place : place + 2] = b"\xff" + bytes([rng.choice([0xD9, 0xDA, 0xD8, 0xD0, 0xC4, 0xDB])])
        case 3:
            data[scan:-2] = rng.randbytes(len(data) - 2 - scan)
        case 4:
            data[rng.randrange(2, scan)] ^= 1 << rng.randrange(8)
        case 5:
            del data[place:]
    return bytes(data)


def test_damage_has_the_same_outcome_whatever_was_decoded_before_and_beside_it(frames, isolated):
    """A run that goes on has decoded nothing yet; one that was not interrupted knows the headers of its data set."""
    rng = random.Random(5)
    experienced = ClipDecoder(frames, isolated, SIZE)
    clips = [clip(damaged(number, rng)) for number in range(48)]
    causes, reasons, pixels = decode(experienced, clips, 1)
    again = decode(experienced, clips[::-1], 1)
    assert again[1][::-1] == reasons
    outcomes = set()
    for row, one in enumerate(clips):
        (cause,), (reason,), (own,) = decode(ClipDecoder(frames, isolated, SIZE), [one], 1)
        assert (cause, reason) == (causes[row], reasons[row])
        if cause is None:
            np.testing.assert_array_equal(own, pixels[row])
            np.testing.assert_array_equal(own, again[2][::-1][row])
        outcomes.add((row % 6, cause))
    # Noise behind the header is refused, and so is what is cut off.
    assert {(3, "decode"), (5, "decode")} <= outcomes
    assert not {(3, None), (5, None)} & outcomes
    assert {cause for _, cause in outcomes} == {None, "decode"}


def test_a_clip_that_cannot_be_decoded_costs_itself_alone(decoder):
    whole = [picture(number, 0, 64) for number in range(6)]
    scan = len(read_header(whole[2]).data)
    noise = whole[2][:scan] + random.Random(1).randbytes(500) + b"\xff\xd9"
    text = b"text, not a picture"
    clips = [
        clip(whole[0], whole[1]), clip(noise, whole[1]), clip(whole[3], whole[2][:-200]), clip(whole[4], text),
        clip(b"", whole[1]), clip(whole[5], whole[0]), clip(UNUSUAL["PNG"][:900], text), clip(whole[1], whole[2]),
    ]  # fmt: skip
    causes, reasons, pixels = decode(decoder, clips, 2)
    assert causes == [None, "decode", "decode", "decode", "decode", None, "decode", None]
    for row in (0, 5, 7):
        np.testing.assert_array_equal(pixels[row], by_pillow(*clips[row].jpegs))
    assert "frame 1 of 2: no image" in reasons[3]
    assert "frame 1 of 2: the image cannot be decoded" in reasons[2]
    assert reasons[4] == "frame 0 of 2: it is empty"
    assert decode(decoder, clips, 2)[:2] == (causes, reasons)
    assert [decode(decoder, [one], 2)[1][0] for one in clips] == reasons


def test_of_two_damaged_frames_the_first_gives_the_reason_whichever_was_found_first(isolated):
    """It is written down, and a run that goes on must write the same."""

    class Shuffled(FrameDecoder):
        device, needs_trial = torch.device("cpu"), False

        def start(self, requests, out_NHWC, rows):
            return lambda: {number: FrameError("decode", f"number {number}") for number in (2, 3, 1)}

        def close(self):
            pass

    causes, reasons, _ = decode(ClipDecoder(Shuffled(), isolated, SIZE), [clip(PLAIN, PLAIN), clip(PLAIN, PLAIN)], 2)
    assert causes == ["decode", "decode"]
    assert reasons == ["number 1", "number 2"]


def test_a_picture_too_large_is_refused_before_memory_is_taken(decoder):
    causes, (reason, _), _ = decode(decoder, [clip(with_size(PLAIN, 65000, 65000)), clip(PLAIN)], 1)
    assert causes == ["decode", None]
    assert "pixels" in reason


# The trial of headers


class Crashing(FrameDecoder):
    """A decoder whose process may not be given damaged headers; it says what it was given."""

    needs_trial = True

    def __init__(self, frames):
        self._frames, self.device, self.given = frames, frames.device, []

    def empty(self, shape):
        return self._frames.empty(shape)

    def start(self, requests, out_NHWC, rows):
        self.given += [one.jpeg for one in requests]
        return self._frames.start(requests, out_NHWC, rows)

    def close(self):
        pass


@pytest.fixture
def tried(isolated, monkeypatch):
    """What was tried in another process."""
    tried = []

    def try_pictures(samples):
        tried.extend(samples)
        return IsolatedDecoder.try_pictures(isolated, samples)

    monkeypatch.setattr(isolated, "try_pictures", try_pictures)
    return tried


def bad_header(data):
    """A plain file, but for a Huffman table that says it has more codes than there are."""
    at = data.index(b"\xff\xc4") + 5
    bad = data[:at] + b"\xff" * 4 + data[at + 4 :]
    assert read_header(bad) is not None
    return bad


def test_a_header_is_tried_once_and_only_where_it_must_be(frames, isolated, tried):
    small = [clip(picture(number, 0, 64)) for number in range(5)]
    large = [clip(picture(number, 0, 80)) for number in range(3)]
    careful = ClipDecoder(Crashing(frames), isolated, SIZE)
    _, _, expected = decode(ClipDecoder(frames, isolated, SIZE), [*small, *large], 1)
    assert tried == []
    causes, _, pixels = decode(careful, [*small, *large], 1)
    assert causes == [None] * 8
    assert len(tried) == 2
    np.testing.assert_array_equal(pixels, expected)
    # Of each no more than the header, so that damage behind it makes no difference.
    assert all(len(data) < len(large[0].jpegs[0]) for (data,) in tried)
    decode(careful, [*large, *small, clip(UNUSUAL["PNG"])], 1)
    assert len(tried) == 2


def test_a_bad_header_is_never_given_to_such_a_decoder_and_tried_again(frames, isolated, tried):
    fake = Crashing(frames)
    careful = ClipDecoder(fake, isolated, SIZE)
    bad = bad_header(picture(3, 0, 64))
    clips = [clip(picture(0, 0, 64), picture(1, 0, 64)), clip(picture(2, 0, 64), bad), clip(bad, bad)]
    for num_tried in (2, 3):  # a good one once; a bad one is not remembered, as it might have been the machine's fault
        causes, reasons, pixels = decode(careful, clips, 2)
        assert causes == [None, "decode", "decode"]
        assert reasons[1] == reasons[2] != ""
        np.testing.assert_array_equal(pixels[0], by_pillow(*clips[0].jpegs))
        assert len(tried) == num_tried
    assert bad not in fake.given
    assert picture(2, 0, 64) not in fake.given


DAMAGED_AMONG_OTHERS = """
import io
import torch
from PIL import Image
from alpro_stream.stream.clips import ClipDecoder, FramesClip
from alpro_stream.stream.decode import DecodeConfig, build_decoder
from alpro_stream.stream.isolated import IsolatedDecoder
from alpro_stream.stream.view import View

def jpeg(number):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).rotate(11 * number).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()

def refused(decoder, jpegs):
    clips = [FramesClip((data,), (0,), View()) for data in jpegs]
    return [error is not None for error in decoder.decode(clips, decoder.empty(len(clips), 1))]

frames = [jpeg(number) for number in range(32)]
dali, isolated = build_decoder(DecodeConfig(backend="dali", num_workers=2), 28, 32, None), IsolatedDecoder(1, 60.0)
num_refused = 0
for cut in range(4, 34, 3):
    damaged = frames[3][: -10 * cut]
    header = frames[2].replace(b"\\x00\\x1f\\x00\\x00\\x01\\x05", b"\\x00\\x1f\\x00\\xff\\x01\\x05")
    assert header != frames[2]
    for bad in (damaged, damaged + b"\\xff\\xd9", header):
        found = refused(ClipDecoder(dali, isolated, 28), [*frames[:3], bad, *frames[4:]])
        assert not any([*found[:3], *found[4:]])
        num_refused += found[3]
isolated.close()
print(num_refused)
"""


def test_damage_never_takes_the_process_of_dali_with_it():
    """DALI 2.4 crashes when it finds the damage while it still works on other frames of the call."""
    done = subprocess.run([sys.executable, "-c", DAMAGED_AMONG_OTHERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 20


# The whole


def test_bytes_of_a_clip_are_counted():
    assert clip(b"12", b"345").num_bytes == 5
    assert video(b"1234").num_bytes == 4


def test_a_decoder_is_built_with_the_deadline_that_is_set():
    config, gauges = DecodeConfig(num_workers=0, num_processes=1, deadline_s=0.001), Gauges()
    with closing(build_clip_decoder(config, SIZE, 8, None, gauges)) as decoder:
        causes, (reason, _), _ = decode(decoder, [video(VIDEO), clip(PLAIN, PLAIN)], 2)
    assert causes == ["deadline", None]
    assert "(deadline 0.001 s)" in reason
    assert gauges.lap()["stream/fallbacks"] == 0  # what could not be decoded is no fallback


def test_a_decoder_counts_where_it_is_told():
    config, gauges = DecodeConfig(num_workers=0, num_processes=1), Gauges()
    with closing(build_clip_decoder(config, SIZE, 8, None, gauges)) as decoder:
        decode(decoder, [clip(stored_as(PLAIN, "PNG"))], 1)
    assert gauges.lap()["stream/fallbacks"] == 1


def test_many_headers_are_not_remembered_for_ever(frames, isolated, tried, monkeypatch):
    monkeypatch.setattr("alpro_stream.stream.clips._MAX_KNOWN_HEADERS", 2)
    careful = ClipDecoder(Crashing(frames), isolated, SIZE)
    clips = [clip(jpeg(waves(40 + number, 40))) for number in range(3)]
    for number in (0, 0, 1, 2, 0):  # with the third the first ones are forgotten
        assert decode(careful, [clips[number]], 1)[0] == [None]
    widths = [read_header(data).width for (data,) in tried]
    assert widths == [40, 41, 42, 40]
