"""What a frame's numbers mean as colours: matrix, transfer curve and primaries, by what the file states.

Numbers are those of ITU-T H.273, which video files and FFmpeg use.
"""

from typing import Any

from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc

from alpro_stream.errors import MediaError

HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
"""Perceptual quantiser (PQ) and hybrid log-gamma (HLG)."""

_UNSTATED_MATRICES = (0, 2, 3)  # "RGB" on a picture that is not, unspecified, reserved
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,  # the constant-luminance variant, which nobody writes; swscale knows no closer one
}
# Standard definition ends here for players: PAL has 576 lines.
_MOST_SD_LINES, _MOST_SD_COLUMNS = 576, 1024


def matrix_of(frame: Any) -> Colorspace | None:
    """The YCbCr matrix of a frame; None for RGB frames, which need none.

    Where the file states none, BT.709 for more than 576 lines or 1024 columns and BT.601 for less, as players do.

    Raises:
        MediaError: a matrix that cannot be converted (YCgCo, ICtCp).
    """
    if frame.format.is_rgb:
        return None
    if frame.colorspace in _UNSTATED_MATRICES:
        is_hd = frame.height > _MOST_SD_LINES or frame.width > _MOST_SD_COLUMNS
        return Colorspace.ITU709 if is_hd else Colorspace.ITU601
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:
        raise MediaError(f"the video has colour matrix {frame.colorspace} (H.273), which cannot be converted to RGB")
    return matrix


def primaries_of(frame: Any) -> ColorPrimaries:
    """The primaries of an HDR frame: those stated, BT.2020 where none or unusual ones are."""
    stated = frame.color_primaries
    return (
        ColorPrimaries(stated) if stated in (ColorPrimaries.BT709, ColorPrimaries.SMPTE432) else ColorPrimaries.BT2020
    )
