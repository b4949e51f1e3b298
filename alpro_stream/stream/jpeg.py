"""What can be told of a JPEG from its markers alone, in microseconds (ITU-T T.81, annex B)."""

from collections import deque
from dataclasses import dataclass

from PIL import Image

_START, _END = b"\xff\xd8", b"\xff\xd9"
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_SCAN, _APPLICATION_1 = 0xDA, 0xE1
_EXIF_ORIENTATION, _UPRIGHT = 0x0112, 1
_MAX_PIXELS = 36_000_000
# Of brightness, across and down, where the colours have one: libjpeg-turbo knows few others, and refuses those.
_SAMPLING_FACTORS = (0x11, 0x12, 0x21, 0x22)


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Everything before the compressed pixels; files of one encoder at one size and quality share it.

    Attributes:
        data: the bytes.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """

    data: bytes
    width: int
    height: int


class HeaderReader:
    """Reads headers, and knows the last ones again."""

    def __init__(self) -> None:
        self._recent: deque[JpegHeader] = deque(maxlen=8)

    def read(self, data: bytes) -> JpegHeader | None:
        """The header of a plain file, see `read_header`."""
        for header in self._recent:
            if data.startswith(header.data) and data.endswith(_END):
                return header
        found = read_header(data)
        if found is not None:
            self._recent.appendleft(found)
        return found


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a plain file: one that any decoder takes, and takes alike. None for all other bytes.

    Plain is a complete file with one sequential scan of 8 bits in grey or colour, its colours as fine as its
    brightness or half as fine, at most 36 million pixels, that is to be shown as it is stored. Where such a header is
    sound and the end is there, a JPEG decoder gives pixels whatever lies between. Progressive files are not among them
    (a short one can take minutes), nor CMYK, nor turned pictures.
    """
    if data[:2] != _START or data[-2:] != _END:
        return None
    position, width, height, num_components, is_sampled_as_usual = 2, 0, 0, 0, False
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _SCAN:
            # Fewer components than the frame has: more scans, with tables of their own, follow.
            is_whole = num_components in (1, 3) and data[position + 4] == num_components and end <= len(data) - 2
            is_plain = is_whole and is_sampled_as_usual and 0 < width * height <= _MAX_PIXELS
            return JpegHeader(data[:end], width, height) if is_plain else None
        if marker == _APPLICATION_1 and not _is_upright(data[position + 4 : end]):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _SEQUENTIAL_FRAMES or data[position + 4] != 8:
                return None
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            num_components = data[position + 9]
            first, *others = data[position + 11 : end : 3] or b"\0"
            is_sampled_as_usual = num_components == 1 or (first in _SAMPLING_FACTORS and others == [0x11, 0x11])
        position = end
    return None


def grey_jpeg(header: JpegHeader) -> bytes:
    """A file with this header and no compressed pixels: decoders fill it up with grey."""
    return header.data + _END


def _is_upright(segment: bytes) -> bool:
    if not segment.startswith(b"Exif\0"):
        return True
    exif = Image.Exif()
    try:
        exif.load(segment)
        return bool(exif.get(_EXIF_ORIENTATION, _UPRIGHT) == _UPRIGHT)
    except Exception:  # whatever damage is in there: somebody who knows pictures has to look
        return False
