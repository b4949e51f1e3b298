"""What can be told of a JPEG from its markers alone, in microseconds."""

_START, _END = b"\xff\xd8", b"\xff\xd9"
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_SCAN = 0xDA


def jpeg_header(data: bytes) -> bytes | None:
    """Everything before the compressed pixels of a complete file with one scan; None for all other bytes.

    Files of one encoder at one size and quality share their header. Where the header is sound and the end is there,
    a JPEG decoder gives pixels whatever lies between (ITU-T T.81, annex B, has the markers).
    """
    if data[:2] != _START or data[-2:] != _END:
        return None
    position, num_components = 2, 0
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _SCAN:
            # Fewer components than the frame has: more scans, with tables of their own, follow.
            return data[:end] if data[position + 4] == num_components else None
        if marker in _SEQUENTIAL_FRAMES:
            num_components = data[position + 9]
        position = end
    return None


def grey_jpeg(header: bytes) -> bytes:
    """A file with the header that `jpeg_header` found and no compressed pixels: decoders fill it up with grey."""
    return header + _END
