"""What sharding did, as values and as a few lines for the terminal."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from alpro_sharding.worker import Failure
from alpro_stream.shards import DatasetInfo

_MAX_REASONS = 10
# What differs between rows that failed for the same reason: numbers, ids and values (not the names of fields).
_VARIABLE_PART = re.compile(r"(?<=\b(?:id|is) )(?:'[^']*'|\"[^\"]*\")|\b\d+(\.\d+)?\b")


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """The outcome of a run.

    Attributes:
        out: the shard set's folder.
        splits: description of each split that has samples, by name.
        num_rows: manifest lines that were not empty.
        num_samples: samples in all splits.
        num_failures: rows that gave no sample.
        failures_by_reason: how many for each reason, the most frequent first; numbers and names in reasons left out.
        num_shards: shards in all splits.
        num_shards_reused: those that an earlier run had made.
        tokenizer: folder of the trained tokenizer, when one was asked for.
        seconds: how long the run took.
    """

    out: Path
    splits: dict[str, DatasetInfo]
    num_rows: int
    num_samples: int
    num_failures: int
    failures_by_reason: dict[str, int]
    num_shards: int
    num_shards_reused: int
    tokenizer: Path | None
    seconds: float


def count_reasons(failures: Iterable[Failure]) -> dict[str, int]:
    """Failures by stage and reason, the most frequent first."""
    counts = Counter(f"{failure.stage}: {_VARIABLE_PART.sub('…', failure.reason)}" for failure in failures)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe_reasons(counts: dict[str, int]) -> str:
    """``3 x decode: ...; 1 x manifest: ...``, the rest summed up."""
    shown = list(counts.items())[:_MAX_REASONS]
    parts = [f"{count} x {reason}" for reason, count in shown]
    rest = sum(counts.values()) - sum(count for _, count in shown)
    return "; ".join(parts + [f"{rest} for other reasons"] * (rest > 0))


def render_summary(summary: ShardSummary) -> RenderableType:
    """The summary for a terminal; everything that comes from data is escaped."""
    table = Table("split", "samples", "captions", "questions", "shards", "MB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for split, info in summary.splits.items():
        counts = (info.num_samples, info.num_captions, info.num_questions, len(info.shards))
        table.add_row(split, *(f"{count:,}" for count in counts), f"{info.num_bytes / 1e6:,.1f}")
    reused = f", {summary.num_shards_reused} of them made before" if summary.num_shards_reused else ""
    lines = [
        f"{summary.num_rows:,} rows in, {summary.num_samples:,} samples out, {summary.num_shards} shards{reused}, "
        f"{summary.seconds:.1f} s",
    ]
    if summary.num_failures:
        lines.append(f"{summary.num_failures:,} rows gave no sample (see {summary.out / 'failures.jsonl'}):")
        shown = list(summary.failures_by_reason.items())[:_MAX_REASONS]
        lines += [f"  {count:>6,} x {reason}" for reason, count in shown]
    where = [f"shards: {summary.out / split}" for split in summary.splits]
    if summary.tokenizer:
        where.append(f"tokenizer: {summary.tokenizer}")
    return Group(*map(escape, lines), table, *map(escape, where))
