"""Sharding: Ray workers turn a manifest of videos and images into WebDataset shards.

The flow: manifest rows -> `assign` (which row goes to which shard) -> `worker` (one shard a task, through `ray_job`),
which has files fetched and decoded by media processes (`media_pool`, `media_process`) -> `ledger` (what is done) ->
`describe` (``dataset.json``, ``entities.json``, ``failures.jsonl``, duplicates) -> `page` (report and card).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpro_sharding.command import main, run_shard
    from alpro_sharding.config import ShardConfig, WordpieceConfig
    from alpro_sharding.job import shard
    from alpro_sharding.summary import ShardSummary

_HOMES = {
    "ShardConfig": "config",
    "ShardSummary": "summary",
    "WordpieceConfig": "config",
    "main": "command",
    "run_shard": "command",
    "shard": "job",
}

__all__ = ["ShardConfig", "ShardSummary", "WordpieceConfig", "main", "run_shard", "shard"]


def __getattr__(name: str) -> Any:
    """Loads what is asked for: a media process imports this package and must stay small."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
