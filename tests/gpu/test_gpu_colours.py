"""Colours of videos: DALI knows BT.601 in limited range alone, and what is coded otherwise must not get to it."""

from contextlib import closing

import av
import numpy as np
import pytest
import torch
from media_files import write_flat

from alpro_stream.media import FrameConfig
from alpro_stream.stream.clips import ClipDecoder, VideoClip
from alpro_stream.stream.dali import DaliVideoDecoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import FrameChoice, IsolatedDecoder
from alpro_stream.stream.turbo import TurboDecoder
from alpro_stream.stream.view import View

SIZE = 96
STORED = FrameConfig(size=112)
# Numbers of ITU-T H.273: 1 is BT.709, 5 and 6 are BT.601; 2 says nothing. Of FFmpeg: 1 is limited range, 2 full.
LIMITED, FULL = 1, 2
CASES = {
    "bt601 limited": ({"colorspace": 5, "color_range": LIMITED}, 0),
    "bt601 of NTSC": ({"colorspace": 6, "color_range": LIMITED}, 0),
    "bt601 full": ({"colorspace": 5, "color_range": FULL}, 1),
    "bt709 limited": ({"colorspace": 1, "color_range": LIMITED}, 1),
}
# Y, Cb and Cr of a strong colour, which the two matrices show in other colours.
PLANES = (150, 90, 180)
CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9"}
OPTIONS = {"h264": {"qp": "0"}, "hevc": {"x265-params": "qp=1:log-level=none"}, "vp9": {"lossless": "1"}}


@pytest.fixture(scope="module")
def isolated():
    with closing(IsolatedDecoder(1, 30)) as decoder:
        yield decoder


def shown(path, isolated, videos):
    """Mean colour of the clip as a stream shows it, and how many clips were left to PyAV."""
    gauges, frames = Gauges(), TurboDecoder(1)
    clip = VideoClip(path.read_bytes(), FrameChoice(2, "uniform", ("a",), STORED), View((0, 0, SIZE / 112, SIZE / 112)))
    decoder = ClipDecoder(frames, isolated, SIZE, gauges=gauges, videos=videos)
    out = torch.zeros(1, 2, SIZE, SIZE, 3, dtype=torch.uint8, device=videos.device if videos else "cpu")
    assert decoder.decode([clip], out) == [None]
    frames.close()
    return out.float().mean(dim=(0, 1, 2, 3)).cpu().numpy(), gauges.lap().get("stream/fallbacks", 0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("case", CASES)
def test_the_colours_are_those_of_pyav(device, isolated, tmp_path, case, codec):
    if device.type == "cpu" and codec != "vp9":
        pytest.skip("DALI decodes it on a GPU only")
    if CODECS[codec] not in av.codecs_available:
        pytest.skip(f"no encoder {CODECS[codec]}")
    tags, num_left = CASES[case]
    path = write_flat(
        tmp_path / ("a.webm" if codec == "vp9" else "a.mp4"),
        PLANES,
        codec=CODECS[codec],
        options=OPTIONS[codec],
        num_frames=4,
        size=(176, 144),
        **tags,
    )
    expected, _ = shown(path, isolated, None)
    mixed = device.type == "cuda"
    config = DecodeConfig(device="mixed" if mixed else "cpu", backend="dali", num_processes=1)
    with closing(DaliVideoDecoder(config, SIZE, torch.cuda.current_device() if mixed else None)) as videos:
        found, left = shown(path, isolated, videos)
    assert left == num_left
    # What is left to PyAV has its pixels.
    np.testing.assert_allclose(found, expected, atol=0 if num_left else 3)


def test_the_matrices_show_other_colours(isolated, tmp_path):
    """Else the test above could not fail."""
    means = []
    for case in ("bt601 limited", "bt709 limited"):
        path = write_flat(
            tmp_path / f"{case}.mp4", PLANES, num_frames=4, size=(176, 144), options={"qp": "0"}, **CASES[case][0]
        )
        means.append(shown(path, isolated, None)[0])
    assert np.abs(means[0] - means[1]).max() > 8
