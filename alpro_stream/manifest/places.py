"""Where media are: paths, addresses, and the root that relative ones start from."""

import os
import re
from pathlib import Path

SCHEMES = ("http", "https", "s3")
"""What addresses may begin with, in small letters."""

_PATTERN = re.compile(r"[*?\[{]")
_USER = re.compile(r"(?<=://)[^/?#]*@")
_SECRET_PARTS = re.compile(r"[?#].*", re.DOTALL)


def is_address(place: str) -> bool:
    """Whether a text is written as an address, ``scheme://...``, and not as a path."""
    return "://" in place


def scheme_of(address: str) -> str:
    """What stands before ``://``, in small letters, because ``HTTP://`` is the same as ``http://``."""
    return address.partition("://")[0].lower()


def holds_user(address: str) -> bool:
    """Whether an address holds a user name, with or without a password: ``http://user:password@host/``."""
    return _USER.search(address) is not None


def public_place(media: str) -> str:
    """The text of a row's media as it may be published.

    Of an address the query and the fragment are left out, where signed addresses hold secrets, and so are a user name
    and a password. Paths stay as they are.
    """
    return _SECRET_PARTS.sub("", _USER.sub("", media)) if is_address(media) else media


def manifest_folder(path: str | Path) -> Path:
    """The folder of a manifest, absolute: a folder itself, else its parent; of a pattern, what is before its signs."""
    place = Path(path).absolute()
    if place.is_dir():
        return place
    if not place.exists() and (match := _PATTERN.search(str(place))):
        return Path(str(place)[: match.start()].rpartition("/")[0] or "/")
    return place.parent


def media_place(root: str, media: str) -> str:
    """The path or address of a row's media; absolute paths and addresses stay as they are.

    Args:
        root: absolute path or address, as `media_root` gives it.
        media: the row's `media`.
    """
    if is_address(media) or media.startswith("/"):
        return media
    return f"{root.rstrip('/')}/{media}" if is_address(root) else os.path.join(root, media)  # noqa: PTH118
