import math
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from media_files import write_flat

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, open_media, sparse_frames
from alpro_stream.media.colour import matrix_of
from alpro_stream.media.tone import tone_mapped

# Luma weights of red and blue, by the standards' numbers.
WEIGHTS = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
COLOR = (200, 60, 30)


def codes(color, standard, *, full=False, bits=8):
    """Y, Cb and Cr of a colour of 8 bits, from the definition in the standards."""
    red, green, blue = (value / 255 for value in color)
    kr, kb = WEIGHTS[standard]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    differences = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    step = 1 << (bits - 8)
    if full:
        return round(luma * (256 * step - 1)), *(round(128 * step + d * (256 * step - 1)) for d in differences)
    return round(step * (16 + 219 * luma)), *(round(step * (128 + 224 * d)) for d in differences)


def color_of(path, size=32):
    with open_media(path) as file:
        (frame,) = sparse_frames(file, FrameConfig(size=size)).frames
    assert np.ptp(frame, axis=(0, 1)).max() <= 1, "expected a flat picture"
    return frame[16, 16]


@pytest.mark.parametrize(("standard", "stated"), [("601", 6), ("601", 5), ("709", 1), ("2020", 9)])
@pytest.mark.parametrize(
    ("full", "pix_fmt"), [(False, "yuv420p"), (True, "yuvj420p"), (False, "yuv420p10le"), (True, "yuv444p10le")]
)
def test_the_stated_matrix_and_range_are_used(tmp_path, standard, stated, full, pix_fmt):
    planes = codes(COLOR, standard, full=full, bits=10 if "10" in pix_fmt else 8)
    limits = ColorRange.JPEG if full else ColorRange.MPEG
    path = write_flat(tmp_path / "a.mp4", planes, pix_fmt=pix_fmt, colorspace=stated, color_range=limits)
    np.testing.assert_allclose(color_of(path), COLOR, atol=2)


@pytest.mark.parametrize(
    ("size", "standard"),
    [((640, 360), "601"), ((720, 576), "601"), ((1280, 720), "709"), ((360, 640), "709"), ((1040, 400), "709")],
)
def test_an_unstated_matrix_is_that_of_the_size(tmp_path, size, standard):
    path = write_flat(tmp_path / "a.mp4", codes(COLOR, standard), size=size)
    np.testing.assert_allclose(color_of(path), COLOR, atol=2)


def test_rgb_needs_no_matrix(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), COLOR, np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert color_of(path).tolist() == list(COLOR)


def test_a_matrix_that_cannot_be_converted_is_refused():
    frame = SimpleNamespace(format=SimpleNamespace(is_rgb=False), colorspace=8, height=64, width=64)
    with pytest.raises(MediaError, match=r"colour matrix 8 \(H.273\), which cannot be converted"):
        matrix_of(frame)


def pq(nits):
    """SMPTE ST 2084."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(scene):
    """ARIB STD-B67."""
    return math.sqrt(3 * scene) if scene <= 1 / 12 else 0.17883277 * math.log(12 * scene - 0.28466892) + 0.55991073


def srgb(light):
    """IEC 61966-2-1, of 8 bits."""
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


def hdr_clip(path, rgb, transfer):
    """R'G'B' of 0 to 1 as 10-bit BT.2020."""
    planes = codes([255 * value for value in rgb], "2020", bits=10)
    tags = {"colorspace": 9, "color_primaries": 9, "color_range": ColorRange.MPEG, "color_trc": transfer}
    return write_flat(path, planes, pix_fmt="yuv420p10le", **tags)


@pytest.mark.parametrize("nits", [0, 1, 10, 58])
def test_light_that_a_standard_display_shows_stays_as_it_is(tmp_path, nits):
    path = hdr_clip(tmp_path / "a.mp4", [pq(nits)] * 3, ColorTrc.SMPTE2084)
    np.testing.assert_allclose(color_of(path), [srgb(nits / 203)] * 3, atol=2)  # a step of 10 bits is as large


# Of the curve in BT.2390 for a mastering display of 1000 nits and a screen of 203, with no black level, computed by
# bisection of PQ's other direction: nits in, nits out.
@pytest.mark.parametrize(("nits", "shown"), [(100, 99.36), (203, 159.04), (400, 193.61), (1000, 203), (4000, 203)])
def test_bright_light_is_bent_towards_white(nits, shown):
    pixels = np.full((1, 1, 3), round(65535 * pq(nits)), np.uint16)
    found = tone_mapped(pixels, ColorTrc.SMPTE2084, ColorPrimaries.BT2020)
    np.testing.assert_allclose(found.ravel(), [srgb(shown / 203)] * 3, atol=1)


def test_primaries_are_converted(tmp_path):
    # Red, green and blue of BT.709 in BT.2020 (ITU-R BT.2087), at 50 nits.
    columns = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]).T
    for index, light in enumerate(columns):
        path = hdr_clip(tmp_path / f"{index}.mp4", [pq(50 * value) for value in light], ColorTrc.SMPTE2084)
        expected = np.zeros(3)
        expected[index] = srgb(50 / 203)
        np.testing.assert_allclose(color_of(path), expected, atol=9)  # 10 bits are coarse in the dark channels


def test_stated_primaries_of_bt709_stay():
    pixels = (65535 * np.array([[[pq(50), 0, 0]]])).round().astype(np.uint16)
    found = tone_mapped(pixels, ColorTrc.SMPTE2084, ColorPrimaries.BT709)
    np.testing.assert_allclose(found.ravel(), [srgb(50 / 203), 0, 0], atol=1)


def test_hlg_is_shown_as_on_its_reference_display(tmp_path):
    # A scene light of 1/12 is 1000 * (1/12) ** 1.2 = 50.7 nits there, below the knee.
    path = hdr_clip(tmp_path / "a.mp4", [hlg(1 / 12)] * 3, ColorTrc.ARIB_STD_B67)
    np.testing.assert_allclose(color_of(path), [srgb(50.7 / 203)] * 3, atol=1.5)
    # Its reference white, 75 % of the signal, is 203 nits.
    path = hdr_clip(tmp_path / "b.mp4", [0.75] * 3, ColorTrc.ARIB_STD_B67)
    np.testing.assert_allclose(color_of(path), [srgb(159.04 / 203)] * 3, atol=2)


def test_tone_mapping_keeps_the_order_of_greys():
    greys = np.linspace(0, 65535, 1000).round().astype(np.uint16)
    pixels = np.repeat(greys[None, :, None], 3, axis=2)
    for transfer in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        found = tone_mapped(pixels, transfer, ColorPrimaries.BT2020).astype(int)
        assert (np.diff(found, axis=1) >= 0).all()
        assert (found[0, 0].tolist(), found[0, -1].tolist()) == ([0] * 3, [255] * 3)
