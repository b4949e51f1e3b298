"""Work that is done in parts, and how far it is."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0


def in_parts(items: Sequence[T], size: int, what: str) -> Iterator[Sequence[T]]:
    """Yields `size` items at a time (at least one); every few seconds, between two parts, a line says how far it is.

    Args:
        items: of this rank.
        size: of a part; the last one may be smaller.
        what: the items are, for that line.
    """
    size = max(1, size)
    started = told = time.monotonic()
    for start in range(0, len(items), size):
        if start and (now := time.monotonic()) > told + _TELL_EVERY_S:
            told, left_s = now, (now - started) / start * (len(items) - start)
            logger.info("%s: %d of %d of this rank, %.0f s left", what, start, len(items), left_s)
        yield items[start : start + size]
