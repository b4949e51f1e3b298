"""``alpro shard --estimate``: what a corpus will cost, from a sample of its rows; nothing is written."""

import hashlib
import heapq
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from alpro_sharding.config import ShardConfig
from alpro_sharding.filters import usable_captions
from alpro_sharding.job import media_options
from alpro_sharding.media_messages import MediaFailure
from alpro_sharding.media_pool import MediaPool
from alpro_sharding.reasons import count_reasons
from alpro_sharding.results import Failure
from alpro_sharding.worker import media_request, sample_of
from alpro_stream.errors import ConfigError, ManifestError
from alpro_stream.manifest import KINDS, Kind, ManifestRow, RejectedRow, media_root, read_manifest
from alpro_stream.media import is_address
from alpro_stream.shards.sample import stored_bytes

_Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class KindEstimate:
    """What the rows of one kind will give, from those that were tried.

    Attributes:
        num_rows: usable rows of the manifest.
        num_tried: rows that were tried.
        num_worked: of these, the ones that gave a sample.
        sample_bytes: mean size of a sample in the tar.
        decode_s: mean seconds to decode and encode one, on one core.
        fetch_s: mean seconds to fetch and hash one.
    """

    num_rows: int
    num_tried: int
    num_worked: int
    sample_bytes: float
    decode_s: float
    fetch_s: float

    @property
    def num_samples(self) -> float:
        """Samples to expect."""
        return self.num_rows * self.num_worked / self.num_tried if self.num_tried else 0.0

    @property
    def num_bytes(self) -> float:
        """Bytes of tars to expect."""
        return self.num_samples * self.sample_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a corpus will cost.

    Attributes:
        num_rows: rows of the manifest.
        num_rejected: rows that the manifest itself fails; those that repeat the id of another are not looked for.
        kinds: by kind.
        failures_by_reason: of the rows that were tried.
        num_workers: workers that the time is for.
        fetches: files that a worker fetches at a time.
        seconds: how long the estimate took.
    """

    num_rows: int
    num_rejected: int
    kinds: dict[Kind, KindEstimate]
    failures_by_reason: dict[str, int]
    num_workers: int
    fetches: int
    seconds: float = field(compare=False)

    @property
    def num_tried(self) -> int:
        """Rows that were tried."""
        return sum(kind.num_tried for kind in self.kinds.values())

    @property
    def num_bytes(self) -> float:
        """Bytes of tars to expect."""
        return sum(kind.num_bytes for kind in self.kinds.values())

    @property
    def core_s(self) -> float:
        """Seconds of decoding to expect, all cores together."""
        return sum(kind.num_rows * kind.decode_s for kind in self.kinds.values())

    @property
    def fetch_s(self) -> float:
        """Seconds of fetching to expect, all connections together."""
        return sum(kind.num_rows * kind.fetch_s for kind in self.kinds.values())

    @property
    def wall_s(self) -> float:
        """Seconds the job will take: decoding and fetching go on at the same time, so the slower one counts."""
        return max(self.core_s, self.fetch_s / self.fetches) / self.num_workers

    def failed_share(self) -> tuple[float, float]:
        """The share of usable rows that will fail: lower and upper end of its 95 % interval (Wilson's)."""
        num_tried = self.num_tried
        if not num_tried:
            return 0.0, 1.0
        num_rows = sum(kind.num_rows for kind in self.kinds.values())
        failed = 1 - sum(kind.num_samples for kind in self.kinds.values()) / num_rows
        middle = failed + _Z_95**2 / (2 * num_tried)
        half = _Z_95 * math.sqrt(failed * (1 - failed) / num_tried + _Z_95**2 / (4 * num_tried**2))
        scale = 1 + _Z_95**2 / num_tried
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def estimate(
    config: ShardConfig, num_rows: int = 200, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Estimate:
    """Tries a sample of the rows, as sharding would, on this machine.

    Args:
        config: the options of the run.
        num_rows: rows of each kind to try; which ones depends on their ids alone, so it is the same ones every time.
        on_progress: called with the rows tried and the rows to try.

    Raises:
        ManifestError: the manifest cannot be read, or has no usable row.
        ConfigError: fewer than one row to try.
    """
    if num_rows < 1:
        raise ConfigError(f"--rows {num_rows}: at least 1 is needed")
    started = time.monotonic()
    num_of_kind: Counter[Kind] = Counter()
    num_rejected = 0

    def usable(kind: Kind) -> Iterator[ManifestRow]:
        nonlocal num_rejected
        num_rejected = 0
        for row in read_manifest(config.manifest, config.reading):
            if isinstance(row, RejectedRow):
                num_rejected += 1
            elif row.kind == kind:
                num_of_kind[kind] += 1
                yield row

    # Each kind by itself: a few images among many videos would otherwise go untried.
    chosen = [row for kind in KINDS for row in heapq.nsmallest(num_rows, usable(kind), key=_draw)]
    if not chosen:
        raise ManifestError(f"{config.manifest} has no usable row; {num_rejected} cannot be used")
    root = media_root(config.manifest, config.reading)
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    failures: list[Failure] = []
    tried: Counter[Kind] = Counter()
    worked: Counter[Kind] = Counter()
    num_bytes: Counter[Kind] = Counter()
    decode_s: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    fetch_s: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    remote = any(is_address(media_request(row, root).place) for row in chosen)
    with MediaPool(media_options(config), num_workers, one_decode=False) as pool:
        texts = [usable_captions(row.captions, config.filters) for row in chosen]
        requests = (
            (tried_row, None if tried_row[1][1] else media_request(tried_row[0], root))
            for tried_row in zip(chosen, texts, strict=True)
        )
        for (row, (captions, reason)), outcome in pool.outcomes(requests):
            tried[row.kind] += 1
            if reason is not None:
                failures.append(Failure.of_row(row, "filter", reason))
            elif isinstance(outcome, MediaFailure):
                failures.append(Failure.of_row(row, outcome.stage, outcome.reason))
            elif outcome is not None:
                worked[row.kind] += 1
                num_bytes[row.kind] += stored_bytes(sample_of(row, captions, outcome))
                decode_s[row.kind] += outcome.decode_s
                fetch_s[row.kind] += outcome.fetch_s
            on_progress(tried.total(), len(chosen))
    kinds = {
        kind: KindEstimate(
            num_rows=num_of_kind[kind],
            num_tried=tried[kind],
            num_worked=worked[kind],
            sample_bytes=num_bytes[kind] / max(1, worked[kind]),
            decode_s=decode_s[kind] / max(1, worked[kind]),
            fetch_s=fetch_s[kind] / max(1, worked[kind]),
        )
        for kind in KINDS
        if num_of_kind[kind]
    }
    return Estimate(
        num_rows=num_of_kind.total() + num_rejected,
        num_rejected=num_rejected,
        kinds=kinds,
        failures_by_reason=count_reasons(failures),
        num_workers=num_workers,
        fetches=config.limits.fetches if remote else 1,
        seconds=time.monotonic() - started,
    )


def _draw(row: ManifestRow) -> bytes:
    """A number for each row that looks random and is the same in every run."""
    return hashlib.blake2b(row.id.encode(), digest_size=8).digest()
