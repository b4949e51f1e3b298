"""Tone mapping: HDR pixels as a standard display shows them.

The stored code values become light in nits (ITU-R BT.2100), the light is taken from the file's primaries to those of
BT.709, a curve brings what is brighter than a standard display's white down to it, and the result is coded as sRGB.

The curve is the one of ITU-R BT.2390 (section 5.4): in perceptual steps it leaves everything below a knee as it is and
bends the rest smoothly, so that `PEAK_NITS` becomes white (`WHITE_NITS`). It is applied to the largest of R, G and B
and scales all three alike, so hues stay.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorTrc

PEAK_NITS = 1000.0
"""Brightest light that is told apart; what most HDR video is graded for."""

WHITE_NITS = 203.0
"""Light that becomes white: HDR's reference white (ITU-R BT.2408)."""

Floats = npt.NDArray[np.floating[Any]]

_CODES = 1 << 16
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_HLG_GAMMA = 1.2  # of the reference display of 1000 nits
# CIE xy of red, green and blue; the white of all is D65.
_CHROMATICITIES = {
    ColorPrimaries.BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_M1, _M2 = 1305 / 8192, 2523 / 32  # the constants of SMPTE ST 2084
_C1, _C2, _C3 = 107 / 128, 2413 / 128, 2392 / 128
_D65 = (0.3127, 0.3290)


def tone_mapped(pixels: npt.NDArray[np.uint16], transfer: int, primaries: ColorPrimaries) -> npt.NDArray[np.uint8]:
    """HDR pixels as sRGB.

    Args:
        pixels: code values of R'G'B', shape [height, width, 3], 65535 being full scale.
        transfer: PQ or HLG, as `ColorTrc`.
        primaries: what the code values are mixed from.

    Returns:
        8-bit sRGB of the same shape.
    """
    nits = _hlg_nits(pixels) if transfer == ColorTrc.ARIB_STD_B67 else _pq_table()[pixels]
    light = np.maximum(nits @ _to_bt709(primaries).T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    light *= _compressed(brightest) / (brightest * WHITE_NITS)
    steps = np.minimum(light * (_CODES - 1) + 0.5, _CODES - 1).astype(np.uint16)
    return np.take(_srgb_table(), steps)


def _compressed(nits: Floats) -> Floats:
    """The curve of BT.2390: light of up to `PEAK_NITS` brought below `WHITE_NITS`."""
    peak = _pq_code(np.array(PEAK_NITS))
    most = _pq_code(np.array(WHITE_NITS)) / peak
    knee = 1.5 * most - 0.5
    code = np.minimum(_pq_code(nits) / peak, 1)
    t = np.maximum(code - knee, 0) / (1 - knee)
    # A Hermite spline from the knee, where it continues the straight line, to the end, where it is level.
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return _pq_light(np.where(code > knee, bent, code) * peak)


def _pq_light(code: Floats) -> Floats:
    """Nits of PQ code values from 0 to 1 (SMPTE ST 2084)."""
    power = code ** (1 / _M2)
    return np.asarray(10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1))


def _pq_code(nits: Floats) -> Floats:
    """The inverse of `_pq_light`."""
    power = (nits / 10000) ** _M1
    return np.asarray(((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2)


def _hlg_nits(pixels: npt.NDArray[np.uint16]) -> Floats:
    """Nits on the reference display: its gamma depends on the luminance, not on each channel."""
    scene = _hlg_table()[pixels]
    luminance = np.maximum(scene @ _LUMA_2020, 1e-6)[..., None]
    return np.asarray(PEAK_NITS * scene * luminance ** (_HLG_GAMMA - 1))


@functools.cache
def _pq_table() -> Floats:
    return _pq_light(np.linspace(0, 1, _CODES)).astype(np.float32)


@functools.cache
def _hlg_table() -> Floats:
    """Scene light from 0 to 1 of each code value (ARIB STD-B67)."""
    code = np.linspace(0, 1, _CODES)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _srgb_table() -> npt.NDArray[np.uint8]:
    """8-bit sRGB of linear light in 65536 steps; near black, where the curve is steep, one step is below a code."""
    light = np.linspace(0, 1, _CODES)
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * code).astype(np.uint8)


@functools.cache
def _to_bt709(primaries: ColorPrimaries) -> Floats:
    """The matrix from linear light of other primaries to that of BT.709."""
    return np.asarray(np.linalg.inv(_to_xyz(ColorPrimaries.BT709)) @ _to_xyz(primaries), np.float32)


def _to_xyz(primaries: ColorPrimaries) -> npt.NDArray[np.float64]:
    columns = np.array([_xyz(xy) for xy in _CHROMATICITIES[primaries]]).T
    return np.asarray(columns * np.linalg.solve(columns, _xyz(_D65)))


def _xyz(xy: tuple[float, float]) -> npt.NDArray[np.float64]:
    x, y = xy
    return np.array([x / y, 1, (1 - x - y) / y])
