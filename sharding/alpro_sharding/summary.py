"""The outcome of a run as plain values."""

from dataclasses import dataclass
from pathlib import Path

from alpro_stream.shards import DatasetInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSummary:
    """The outcome of a run; of a set of several manifests, of all of them.

    Attributes:
        out: the shard set's folder.
        splits: description of each split that has samples, by name.
        num_rows: rows of the manifests.
        num_samples: samples in all splits.
        num_failures: rows that gave no sample.
        failures_by_reason: how many for each reason, the most frequent first; numbers and names in reasons left out.
        num_duplicate_media: samples whose media an earlier one of their split has too.
        num_duplicate_captions: samples whose captions an earlier one of their split has too.
        num_shards: shards in all splits.
        report: the page about the shard set; None for tars that were indexed in place.
        num_shards_reused: shards that an earlier run had made.
        tokenizer: folder of the trained tokenizer, when one was asked for.
        seconds: how long the run took.
    """

    out: Path
    splits: dict[str, DatasetInfo]
    num_rows: int
    num_samples: int
    num_failures: int
    failures_by_reason: dict[str, int]
    num_duplicate_media: int
    num_duplicate_captions: int
    num_shards: int
    report: Path | None = None
    num_shards_reused: int = 0
    tokenizer: Path | None = None
    seconds: float = 0.0
