"""What sharding did, or will cost, in a few lines for the terminal; everything that comes from data is escaped."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from alpro_sharding.estimate import Estimate
from alpro_sharding.job import Progress
from alpro_sharding.summary import ShardSummary
from alpro_stream.pages.numbers import data_size, decimal, duration, percent

_MAX_REASONS = 10


def render_summary(summary: ShardSummary) -> RenderableType:
    """The outcome of a run."""
    table = _table("split", "samples", "captions", "questions", "shards", "size")
    for split, info in summary.splits.items():
        counts = (info.num_samples, info.num_captions, info.num_questions, len(info.shards))
        table.add_row(escape(split), *(f"{number:,}" for number in counts), data_size(info.num_bytes))
    reused = f", {summary.num_shards_reused} of them made before" if summary.num_shards_reused else ""
    lines = [
        f"{summary.num_rows:,} rows in, {summary.num_samples:,} samples out, {summary.num_shards} shards{reused}, "
        f"{summary.seconds:.1f} s",
    ]
    if summary.num_failures:
        lines.append(f"{summary.num_failures:,} rows gave no sample (see {summary.out / 'failures.jsonl'}):")
        lines += _reasons(summary.failures_by_reason)
    if summary.num_duplicate_media or summary.num_duplicate_captions:
        lines.append(
            f"{summary.num_duplicate_media:,} samples repeat the media of another, "
            f"{summary.num_duplicate_captions:,} its captions (lists beside the shards)"
        )
    where = (
        [f"shards: {summary.out / split}" for split in summary.splits] if summary.report else [f"shards: {summary.out}"]
    )
    if summary.tokenizer:
        where.append(f"tokenizer: {summary.tokenizer}")
    if summary.report:
        where.append(f"report: {summary.report}")
    return Group(*map(escape, lines), table, *map(escape, where))


def render_estimate(estimate: Estimate) -> RenderableType:
    """What a corpus will cost."""
    table = _table("kind", "rows", "tried", "worked", "bytes a sample", "decode", "fetch", "samples", "size")
    for kind, found in estimate.kinds.items():
        table.add_row(
            kind,
            f"{found.num_rows:,}",
            f"{found.num_tried:,}",
            f"{found.num_worked:,}",
            data_size(found.sample_bytes),
            f"{1000 * found.decode_s:.0f} ms",
            f"{1000 * found.fetch_s:.0f} ms",
            f"{found.num_samples:,.0f}",
            data_size(found.num_bytes),
        )
    low, high = estimate.failed_share()
    lines = [
        f"{estimate.num_rows:,} rows, of which the manifest itself fails {estimate.num_rejected:,}; "
        f"{estimate.num_tried:,} tried in {duration(estimate.seconds)}"
    ]
    totals = [
        f"size      {data_size(estimate.num_bytes)}",
        f"time      {duration(estimate.wall_s)} with {estimate.num_workers} workers "
        f"({estimate.core_s / 3600:,.1f} core hours of decoding)",
        f"failures  {percent(low)} to {percent(high)} of the rows (95 % interval)",
        *_reasons(estimate.failures_by_reason),
    ]
    return Group(*map(escape, lines), table, *map(escape, totals))


def spell_progress(progress: Progress, seconds: float) -> str:
    """``rows, 12.5 rows/s, 3 min 20 s left``; the rate is that of this run."""
    if not progress.num_new or seconds <= 0:
        return "rows"
    rate = progress.num_new / seconds
    left = (progress.num_rows - progress.num_done) / rate
    return f"rows, {decimal(rate)} rows/s, {duration(left)} left"


def _reasons(counts: dict[str, int]) -> list[str]:
    return [f"  {number:>6,} x {reason}" for reason, number in list(counts.items())[:_MAX_REASONS]]


def _table(*titles: str) -> Table:
    table = Table(*titles, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
