"""Pictures and clips inside the page itself, as data URIs."""

import base64

from alpro_stream.errors import MediaError

_SIGNATURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"\x1a\x45\xdf\xa3": "video/webm"}


def data_uri(file: bytes) -> str:
    """A JPEG, PNG or WebM file as a ``data:`` address.

    Raises:
        MediaError: the bytes are none of them.
    """
    for signature, mime_type in _SIGNATURES.items():
        if file.startswith(signature):
            return f"data:{mime_type};base64,{base64.b64encode(file).decode('ascii')}"
    found = file[:8].hex(" ") or "no bytes"
    raise MediaError(
        f"a picture of a page starts with {found}; expected the bytes of a JPEG or PNG file, or of WebM for a clip"
    )


def picture_source(picture: bytes | str) -> str:
    """What an ``img`` element gets: the picture itself, or the address that it is served at."""
    return picture if isinstance(picture, str) else data_uri(picture)
