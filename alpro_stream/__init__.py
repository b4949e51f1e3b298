"""Train ALPRO (Align and Prompt, CVPR 2022) from streamed WebDataset shards."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpro_stream.pretrained import Alpro as Alpro
    from alpro_stream.pretrained import Answer as Answer

__all__ = ["Alpro", "Answer"]


def __getattr__(name: str) -> Any:
    """`Alpro` is loaded when it is asked for: sharding workers import this package, and have no torch."""
    if name in __all__:
        return getattr(importlib.import_module("alpro_stream.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
