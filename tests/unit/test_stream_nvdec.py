"""Which frames of a stored video are wanted, and two decoders for them: DALI in this process, PyAV in others."""

import io
from contextlib import closing

import numpy as np
import pytest
import torch
from media_files import constant_rate, write_video

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, sparse_frames
from alpro_stream.stream.clips import ClipDecoder, VideoClip
from alpro_stream.stream.dali import DaliVideoDecoder
from alpro_stream.stream.decode import DecodeConfig, build_video_decoder
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import FrameChoice, IsolatedDecoder
from alpro_stream.stream.nvdec import locate_video
from alpro_stream.stream.turbo import TurboDecoder
from alpro_stream.stream.view import View

SIZE = 96
CONFIG = DecodeConfig(backend="dali", num_processes=1)
STORED = FrameConfig(fps=10, size=112)
VIEW = View((0, 0, SIZE / 112, SIZE / 112))


def numbered(count, width=176, height=144):
    """Frames of one grey each, further from their neighbours than any decoder errs."""
    return [np.full((height, width, 3), 20 + 40 * (index % 5) + 2 * index, np.uint8) for index in range(count)]


@pytest.fixture(scope="module")
def vp9(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "a.webm"
    return write_video(path, constant_rate(20, 25), codec="libvpx-vp9", width=176, height=144, pixels=numbered(20))


@pytest.fixture(scope="module")
def mpeg4(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    return write_video(path, constant_rate(20, 25), codec="mpeg4", width=176, height=144, pixels=numbered(20))


def choice(policy="uniform", num_frames=4, identity=("a",)):
    return FrameChoice(num_frames, policy, identity, STORED)


def locate(data, chosen):
    return locate_video(io.BytesIO(data), chosen.stored, chosen.among)


@pytest.mark.parametrize("policy", ["uniform", "headtail"])
def test_the_frames_found_are_those_that_sparse_frames_gives(vp9, policy):
    data = vp9.read_bytes()
    every = sparse_frames(io.BytesIO(data), FrameConfig(fps=1000, size=112)).frames
    for draw in range(5):
        chosen = choice(policy, identity=(draw,))
        found = locate(data, chosen)
        expected = sparse_frames(io.BytesIO(data), STORED, choose=chosen.among).frames
        assert len(found.frames) == 4
        for number, frame in zip(found.frames, expected, strict=True):
            np.testing.assert_array_equal(every[number], frame)
        assert (found.width, found.height) == (112, 112)
        assert (found.facts.codec, found.facts.num_packets, found.facts.num_frames) == ("vp9", 20, 20)


def test_what_cannot_be_counted_is_no_guess():
    with pytest.raises(MediaError):
        locate(b"no video", choice())


def test_videos_are_decoded_here_where_possible_and_by_others_where_not(vp9, mpeg4):
    gauges, files = Gauges(), [mpeg4.read_bytes(), vp9.read_bytes(), b"no video", vp9.read_bytes()]
    clips = [VideoClip(data, choice("headtail", identity=(row,)), VIEW) for row, data in enumerate(files)]
    videos = DaliVideoDecoder(CONFIG, SIZE, None)
    with (
        closing(ClipDecoder(TurboDecoder(1), IsolatedDecoder(1, 30), SIZE, gauges=gauges, videos=videos)) as here,
        closing(ClipDecoder(TurboDecoder(1), IsolatedDecoder(1, 30), SIZE)) as elsewhere,
    ):
        out, expected = here.empty(4, 4), elsewhere.empty(4, 4)
        errors, others = here.decode(clips, out), elsewhere.decode(clips, expected)
    for found in (errors, others):
        assert [error is None for error in found] == [True, True, False, True]
    assert gauges.lap()["stream/fallbacks"] == 1  # MPEG-4, which NVDEC is not given; what is no video is an error
    torch.testing.assert_close(out[0], expected[0], rtol=0, atol=0)
    for row in (1, 3):  # flat grey, which both decode alike
        torch.testing.assert_close(out[row], expected[row], rtol=0, atol=3)


def test_there_is_none_on_a_cpu():
    assert build_video_decoder(DecodeConfig(), SIZE, 64, None) is None
