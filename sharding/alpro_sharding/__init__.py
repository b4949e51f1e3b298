"""Sharding: Ray workers turn a manifest of videos and images into WebDataset shards of sparse frames.

The flow: manifest rows -> `assign` (which row goes to which shard) -> `worker` (one shard a task, through `ray_job`) ->
`ledger` (what is done) -> ``dataset.json``, ``entities.json``, ``failures.jsonl`` and, when asked for, a tokenizer.
"""

from alpro_sharding.command import main, run_shard
from alpro_sharding.config import ShardConfig, WordpieceConfig
from alpro_sharding.job import shard
from alpro_sharding.report import ShardSummary

__all__ = ["ShardConfig", "ShardSummary", "WordpieceConfig", "main", "run_shard", "shard"]
