"""The one measure by which decoded frames are equal to reference frames."""

import numpy as np

ATOL = 1
"""Largest difference of a colour, of 255. Decoders of these codecs are exact by their standards, and so is swscale with
the flags that are used; only turning before scaling or after it rounds differently."""


def assert_frames_equal(found, expected, atol=ATOL):
    """Fails when a frame differs anywhere, and says which one does and whether it is another of the expected frames.

    Args:
        found: frames of uint8, [height, width, 3] each.
        expected: as many, of the same size.
        atol: largest difference, where other decoders than swscale and FFmpeg's are compared.
    """
    assert len(found) == len(expected), f"{len(found)} frames, expected {len(expected)}"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype == np.uint8, f"frame {number}: {one.dtype} and {other.dtype}, expected uint8"
        assert one.shape == other.shape, f"frame {number}: size {one.shape}, expected {other.shape}"
        if _difference(one, other) > atol:
            same = [index for index, frame in enumerate(expected) if _difference(one, frame) <= atol]
            hint = f"it equals expected frame {same[0]}" if same else "it equals none of the expected frames"
            raise AssertionError(f"frame {number} differs by up to {_difference(one, other)} of 255; {hint}")


def _difference(one, other):
    one, other = np.asarray(one, np.int16), np.asarray(other, np.int16)
    return 255 if one.shape != other.shape else int(np.abs(one - other).max(initial=0))
