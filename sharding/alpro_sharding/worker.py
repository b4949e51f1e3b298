"""What one task does: read the media of one planned shard, write the shard, note the result. No Ray in here."""

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alpro_sharding.assign import PlannedShard
from alpro_sharding.duplicates import SampleHashes, captions_hash, media_hash
from alpro_sharding.entities import CountNouns, NounOptions, noun_counter
from alpro_sharding.existing import ExistingSamples
from alpro_sharding.filters import usable_captions
from alpro_sharding.media_messages import MediaAnswer, MediaFailure, MediaOptions, MediaRequest
from alpro_sharding.media_pool import MediaPool
from alpro_sharding.results import DIGESTS_SUFFIX, HASHES_SUFFIX, SETTLED_STAGES, Failure, ShardResult, Work, read_note
from alpro_sharding.statistics import Statistics
from alpro_stream.errors import WriteError
from alpro_stream.manifest import ManifestRow, media_place, public_place, sample_key
from alpro_stream.media import is_address
from alpro_stream.shards import Sample, SampleMetadata, ShardInfo, ShardWriter, VideoFile
from alpro_stream.shards.storage import publish_bytes

OnRow = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All a worker needs: rows and paths, no media bytes.

    Attributes:
        planned: the shard and its rows.
        media_root: folder or address that relative media paths start from.
        directory: folder of the split.
        note: where the result is noted once the shard is published.
        options: how media become members of samples.
        nouns: how nouns are counted.
        retry: try the rows again that failed before, and leave the shard as it is when none of them succeeds.
    """

    planned: PlannedShard
    media_root: str
    directory: Path
    note: Path
    options: MediaOptions
    nouns: NounOptions
    retry: bool = False


@dataclass(slots=True)
class _Tally:
    """What is gathered on the way through a shard."""

    failures: list[Failure] = field(default_factory=list)
    nouns: Counter[str] = field(default_factory=Counter)
    statistics: Statistics = field(default_factory=Statistics)
    hashes: SampleHashes = field(default_factory=SampleHashes)
    num_new: int = 0
    fetch_s: float = 0.0
    decode_s: float = 0.0
    write_s: float = 0.0
    text_s: float = 0.0

    def add(self, sample: Sample, count_nouns: CountNouns) -> None:
        """Counts a sample in."""
        started = time.monotonic()
        metadata, source = sample.metadata, sample.metadata.source
        self.nouns.update(count_nouns(metadata.captions))
        self.statistics = self.statistics + Statistics.of_sample(metadata, len(sample.frames))
        media = media_hash(source["sha256"], source["start_s"], source["end_s"])
        self.hashes.add(media, captions_hash(metadata.captions))
        self.text_s += time.monotonic() - started


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with what is known of it before any file is opened."""

    row: ManifestRow
    captions: tuple[str, ...]
    failure: Failure | None = None
    sample: Sample | None = None


def make_shard(task: ShardTask, on_row: OnRow = lambda num_rows: None) -> ShardResult:
    """Makes one shard and notes the result; a row that fails is a `Failure`, it never raises.

    Samples that an earlier attempt has published are taken over; doing it again gives the same bytes. Each file
    appears whole or not at all, so a task may die at any moment and be repeated.

    Args:
        task: the shard.
        on_row: called with the number of rows done, after each.

    Raises:
        WriteError: the target cannot be written.
    """
    started = time.monotonic()
    tally = _Tally()
    # Only a retry has a note to respect: of a shard that is made, the note is gone before its files change.
    previous = read_note(task.note) if task.retry else None
    trusted = _trusted_digests(task, previous)
    writer = _write_samples(task, trusted, _settled_failures(previous), tally, on_row)
    shard: ShardInfo | None = None
    now = time.monotonic()
    if writer is not None and previous is not None and not tally.num_new:
        writer.abort()
        shard = previous.shard
    elif writer is not None:
        # A note that is there always describes the files beside it, and a tar is always known by its digest, at
        # whatever moment this process dies.
        digests = "".join(f"{digest}\n" for digest in [*sorted(trusted), writer.finish()])
        _publish(task.note.with_suffix(DIGESTS_SUFFIX), digests.encode())
        task.note.unlink(missing_ok=True)
        shard = writer.close()
        _publish(task.note.with_suffix(HASHES_SUFFIX), tally.hashes.to_bytes())
    tally.write_s += time.monotonic() - now
    work = Work(
        host=platform.node(),
        wall_s=time.monotonic() - started,
        fetch_s=tally.fetch_s,
        decode_s=tally.decode_s,
        write_s=tally.write_s,
        text_s=tally.text_s,
    )
    result = ShardResult(
        num_rows=len(task.planned.rows),
        shard=shard,
        failures=tuple(tally.failures),
        nouns=dict(tally.nouns),
        statistics=tally.statistics,
        work=work,
    )
    _publish(task.note, result.to_json())
    return result


def _write_samples(
    task: ShardTask, trusted: frozenset[str], settled: dict[int, Failure], tally: _Tally, on_row: OnRow
) -> ShardWriter | None:
    """Writes the samples of the rows that work, without publishing them; None when there is none."""
    planned, count_nouns = task.planned, noun_counter(task.nouns)
    writer: ShardWriter | None = None
    with ExistingSamples(task.directory, planned.name, trusted) as existing:
        try:
            for sample in _samples(task, existing, settled, tally, on_row):
                started = time.monotonic()
                # The file is made only once there is a sample to put into it.
                writer = writer or ShardWriter(task.directory, planned.name, planned.kind)
                writer.add(sample)
                tally.write_s += time.monotonic() - started
                tally.add(sample, count_nouns)
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
    return writer


def _trusted_digests(task: ShardTask, previous: ShardResult | None) -> frozenset[str]:
    """Digests that the shard's tar may have: of the one that is noted, and of those that were being published."""
    noted = {previous.shard.sha256} if previous is not None and previous.shard is not None else set()
    try:
        return frozenset(noted.union(task.note.with_suffix(DIGESTS_SUFFIX).read_text().split()))
    except OSError:
        return frozenset(noted)


def _publish(path: Path, data: bytes) -> None:
    try:
        publish_bytes(path, data)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def media_request(row: ManifestRow, media_root: str) -> MediaRequest:
    """What a media process is asked for a row."""
    return MediaRequest(media_place(media_root, row.media), row.byte_range, row.kind, row.start_s, row.end_s)


def sample_of(row: ManifestRow, captions: tuple[str, ...], answer: MediaAnswer) -> Sample:
    """The sample that a row and what was found in its file make."""
    source = {"media": public_place(row.media), **asdict(answer.source), "start_s": row.start_s, "end_s": row.end_s}
    source["sha256"] = answer.sha256
    if answer.sampling is not None:
        source["sampling"] = answer.sampling
    if row.license is not None:
        source["license"] = row.license
    metadata = SampleMetadata(
        key=sample_key(row.id),
        id=row.id,
        captions=captions,
        qa=row.qa,
        kind=row.kind,
        frame_timestamps_s=answer.timestamps_s,
        source=source,
    )
    if answer.timestamps_s:
        return Sample(metadata, tuple(member.read() for member in answer.members))
    (video,) = answer.members
    return Sample(metadata, (), VideoFile(video.extension, video.open(), video.size))


def num_processes(rows: tuple[ManifestRow, ...], media_root: str, options: MediaOptions) -> int:
    """Media processes that serve these rows: files of this machine need one to decode and one to be read from."""
    remote = any(is_address(media_place(media_root, row.media)) for row in rows)
    return 1 + options.limits.fetches if remote else 2


def _samples(
    task: ShardTask, existing: ExistingSamples, settled: dict[int, Failure], tally: _Tally, on_row: OnRow
) -> Iterator[Sample]:
    """The samples of the rows that work, in order; the others are appended to the failures."""
    rows = task.planned.rows
    pool = _pool(task.options, num_processes(rows, task.media_root, task.options))
    work = ((item, _request_of(item, task.media_root)) for item in _prepared(task, existing, settled))
    for num_done, (item, outcome) in enumerate(pool.outcomes(work), 1):
        row, failure, sample = item.row, item.failure, item.sample
        if isinstance(outcome, MediaFailure):
            failure = Failure.of_row(row, outcome.stage, outcome.reason)
        elif outcome is not None:
            tally.fetch_s += outcome.fetch_s
            tally.decode_s += outcome.decode_s
            tally.num_new += 1
            sample = sample_of(row, item.captions, outcome)
        if failure is not None:
            tally.failures.append(failure)
        elif sample is not None:
            yield sample
        on_row(num_done)


def _prepared(task: ShardTask, existing: ExistingSamples, settled: dict[int, Failure]) -> Iterator[_Row]:
    for row in task.planned.rows:
        captions, reason = usable_captions(row.captions, task.options.filters)
        failure = settled.get(row.line)
        if failure is None and reason is not None:
            failure = Failure.of_row(row, "filter", reason)
        yield _Row(row, captions, failure, None if failure else existing.get(row))


def _request_of(item: _Row, media_root: str) -> MediaRequest | None:
    return None if item.failure or item.sample else media_request(item.row, media_root)


def _settled_failures(previous: ShardResult | None) -> dict[int, Failure]:
    failures = previous.failures if previous else ()
    return {failure.line: failure for failure in failures if failure.stage in SETTLED_STAGES}


def _pool(options: MediaOptions, num_processes: int) -> MediaPool:
    """The media processes of this worker, which stay for its next shard."""
    wanted = (options, num_processes)
    if _kept.get("for") != wanted:
        if "pool" in _kept:
            _kept["pool"].close()
        _kept.update({"for": wanted, "pool": MediaPool(options, num_processes)})
    pool: MediaPool = _kept["pool"]
    return pool


# Ray runs one shard after the other in the same process: starting the media processes costs a second.
_kept: dict[str, Any] = {}
