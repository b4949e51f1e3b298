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

from alpro_stream.media import FrameConfig
from alpro_stream.stream.clips import ClipDecoder, FramesClip, VideoClip, build_clip_decoder
from alpro_stream.stream.decode import WHOLE_FRAME, DecodeConfig, FrameRequest, build_decoder
from alpro_stream.stream.isolated import ClipRequest, IsolatedDecoder, IsolatedError
from alpro_stream.stream.jpeg import jpeg_header
from alpro_stream.testing.shards import picture

VIDEO = Path(__file__).resolve().parents[2] / "examples/clips/videos/v015.mp4"
SIZE = 48


@pytest.fixture(scope="module")
def frames():
    return build_decoder(DecodeConfig(num_threads=1), SIZE, max_frames=16, device_id=None)


@pytest.fixture(scope="module")
def isolated():
    with closing(IsolatedDecoder(1, 30.0)) as isolated:
        yield isolated


@pytest.fixture
def decoder(frames, isolated):
    return ClipDecoder(frames, isolated)


def clip(*jpegs, positions=None):
    requests = tuple(FrameRequest(jpeg, (0.1, 0.1, 0.8, 0.8), flip=False) for jpeg in jpegs)
    return FramesClip(requests, np.arange(len(jpegs)) if positions is None else np.array(positions))


def video(data):
    frames = FrameConfig(fps=1, max_frames=8, size=64)
    return VideoClip(data, ClipRequest(2, "headtail", (0, "x", 0, "key"), WHOLE_FRAME, False, SIZE, frames))


def outcome(found):
    return (found.cause, found.reason) if isinstance(found, IsolatedError) else found.numpy().tobytes()


def damaged(number, rng):
    """A frame with one of several kinds of damage, each at a random place."""
    data = bytearray(picture(number, 0, 64))
    scan = len(jpeg_header(bytes(data)))
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


def test_damage_has_the_same_outcome_whatever_was_decoded_before(frames, isolated):
    """A run that goes on has decoded nothing yet; one that was not interrupted knows the headers of its data set."""
    rng = random.Random(5)
    experienced = ClipDecoder(frames, isolated)
    experienced.decode([clip(picture(0, 0, 64))])
    kinds = set()
    for number in range(60):
        data = damaged(number, rng)
        ((expected,), (found,)) = (one.decode([clip(data)]) for one in (ClipDecoder(frames, isolated), experienced))
        assert outcome(found) == outcome(expected), number
        kinds.add((number % 6, isinstance(found, IsolatedError)))
    assert {(3, False), (4, True), (5, True)} <= kinds


def test_a_clip_that_cannot_be_decoded_costs_itself_alone(decoder):
    whole = [picture(number, 0, 64) for number in range(6)]
    cut, no_picture = whole[2][:-200], b"text, not a picture"
    clips = [clip(whole[0], whole[1]), clip(cut), clip(whole[3]), clip(whole[4], no_picture), clip(b""), clip(whole[5])]
    first, again = decoder.decode(clips), decoder.decode(clips)
    assert [one.cause if isinstance(one, IsolatedError) else len(one) for one in first] == [
        2, "decode", 1, "decode", "decode", 1,
    ]  # fmt: skip
    assert list(map(outcome, first)) == list(map(outcome, again))
    alone = [decoder.decode([one])[0] for one in clips]
    assert list(map(outcome, first)) == list(map(outcome, alone))
    assert "frame 1 of 2" in first[3].reason


DAMAGED_AMONG_OTHERS = """
import io
import numpy as np
from PIL import Image
from alpro_stream.stream.clips import ClipDecoder, FramesClip
from alpro_stream.stream.decode import WHOLE_FRAME, DecodeConfig, FrameRequest, build_decoder
from alpro_stream.stream.isolated import IsolatedDecoder, IsolatedError

def jpeg(number):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).rotate(11 * number).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()

def decode(decoder, jpegs):
    clips = [FramesClip((FrameRequest(data, WHOLE_FRAME, False),), np.array([0])) for data in jpegs]
    return [isinstance(found, IsolatedError) for found in decoder.decode(clips)]

frames = [jpeg(number) for number in range(32)]
dali, isolated = build_decoder(DecodeConfig(num_threads=2), 28, 32, None), IsolatedDecoder(1, 60.0)
refused = 0
for cut in range(4, 34):
    damaged = frames[3][: -10 * cut]
    header = frames[2].replace(b"\\x00\\x1f\\x00\\x00\\x01\\x05", b"\\x00\\x1f\\x00\\xff\\x01\\x05")
    assert header != frames[2]
    for bad in (damaged, damaged + b"\\xff\\xd9", header):
        found = decode(ClipDecoder(dali, isolated), [*frames[:3], bad, *frames[4:]])
        assert not any([*found[:3], *found[4:]])
        refused += found[3]
isolated.close()
print(refused)
"""


def test_damage_never_takes_the_process_with_it():
    """DALI 2.4 crashes when it finds the damage while it still works on other frames of the call."""
    done = subprocess.run([sys.executable, "-c", DAMAGED_AMONG_OTHERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 60


def test_headers_that_were_never_met_are_tried_once_each(decoder, isolated, monkeypatch):
    tried = []

    def check(jpegs):
        tried.extend(jpegs)
        return IsolatedDecoder.check_jpegs(isolated, jpegs)

    monkeypatch.setattr(isolated, "check_jpegs", check)
    small = [clip(picture(number, 0, 64)) for number in range(5)]
    large = [clip(picture(number, 0, 80)) for number in range(3)]
    decoder.decode([*small, *large])
    assert len(tried) == 2
    decoder.decode([*large, *small])
    assert len(tried) == 2


def test_a_frame_that_is_shown_several_times_is_decoded_once(frames, isolated):
    requests = []

    class Counted:
        def decode(self, wanted):
            requests.append(len(wanted))
            return frames.decode(wanted)

    decoder = ClipDecoder(Counted(), isolated)
    jpegs = [picture(3, frame, 64) for frame in (0, 9)]
    (repeated,) = decoder.decode([clip(*jpegs, positions=[0, 0, 1, 1])])
    assert sum(requests) == 2
    (plain,) = decoder.decode([clip(*jpegs)])
    assert not torch.equal(plain[0], plain[1])
    assert torch.equal(repeated, plain[[0, 0, 1, 1]])


def test_a_progressive_frame_is_decoded_and_never_vouches_for_others(decoder):
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(3, 0, 64))).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    for data, is_fine in ((whole, True), (whole[: len(whole) // 2], False), (whole, True)):
        (found,) = decoder.decode([clip(data)])
        assert isinstance(found, torch.Tensor) is is_fine


def test_videos_and_frames_together_keep_their_places(decoder):
    data = VIDEO.read_bytes()
    jpeg = picture(1, 0, 64)
    found = decoder.decode([clip(jpeg), video(data), video(data[:3000]), video(b""), clip(jpeg[:50]), video(data)])
    assert [getattr(one, "cause", None) for one in found] == [None, None, "decode", "decode", "decode", None]
    assert found[1].shape == (2, SIZE, SIZE, 3)
    assert torch.equal(found[1], found[5])
    assert decoder.decode([]) == []


def test_bytes_of_a_clip_are_counted():
    assert clip(b"12", b"345").num_bytes == 5
    assert video(b"1234").num_bytes == 4


def test_a_decoder_is_built_with_the_deadline_that_is_set():
    config = DecodeConfig(num_threads=0, num_processes=1, deadline_s=0.001)
    with closing(build_clip_decoder(config, SIZE, 8, None)) as decoder:
        (found,) = decoder.decode([video(VIDEO.read_bytes())])
    assert found.cause == "deadline"
    assert "(deadline 0.001 s)" in found.reason
