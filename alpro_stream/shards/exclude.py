"""Exclude lists: keys of samples that are not to be used, one a line; shards stay as they are.

A ``#`` at the beginning of a line or after white space starts a comment::

    # copies, found when sharding
    clip_7  # same media as clip_3
"""

import re
from collections.abc import Iterable, Iterator

from alpro_stream.errors import ShardError

_COMMENT = re.compile(r"(?:^|\s)#.*")


def format_exclude(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lines of an exclude list, line breaks included.

    Args:
        entries: key and reason of each sample; an empty reason gives no comment.
    """
    for key, reason in entries:
        comment = " ".join(reason.split())  # a line break would make the rest a key
        yield f"{key} # {comment}\n" if comment else f"{key}\n"


def parse_exclude(text: str) -> list[str]:
    """The keys of an exclude list, in its order.

    Raises:
        ShardError: a line that holds more than a key; the line is named.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = _COMMENT.sub("", line).split()
        if len(words) > 1:
            raise ShardError(
                f"line {number} of the exclude list is {line.strip()[:60]!r}; "
                f"expected one key a line, and a comment after '#'"
            )
        keys += words
    return keys
