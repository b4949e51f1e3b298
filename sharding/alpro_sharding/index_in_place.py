"""Existing WebDataset tars made readable as they are: an index beside each, and a description of all of them.

Nothing is copied or decoded. Samples that cannot be used (no media, no caption) are left out of the index, and listed.
"""

import fcntl
import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from alpro_sharding.config import ShardConfig
from alpro_sharding.entities import CountNouns, NounOptions, noun_counter, noun_options, vocabulary
from alpro_sharding.reasons import ReasonCounts, describe_reasons
from alpro_sharding.results import Failure, ShardResult, Work, encode_failures
from alpro_sharding.statistics import Statistics
from alpro_sharding.summary import ShardSummary
from alpro_stream.config import save_config
from alpro_stream.errors import ConfigError, ShardError
from alpro_stream.manifest import ManifestConfig, tar_paths
from alpro_stream.shards import DatasetInfo, ShardInfo, save_dataset_info, save_entities
from alpro_stream.shards.foreign import in_place_options, read_tar
from alpro_stream.shards.index import format_index
from alpro_stream.shards.layout import CONFIG_FILE, ENTITIES_FILE, FAILURES_FILE, index_path
from alpro_stream.shards.storage import file_digest, publish_bytes, publish_chunks, remove_temporaries

NOTES_FOLDER = ".index_notes"


def index_in_place(config: ShardConfig, on_tar: Callable[[int, int], None] = lambda done, total: None) -> ShardSummary:
    """Indexes the tars of a folder and describes them.

    A tar that was indexed before is read again only when it changed, or an option that decides what is noted of it.

    Args:
        config: its `manifest` names the tars, all in the folder `out`.
        on_tar: called with the tars done and all tars.

    Raises:
        ConfigError: the tars do not lie in `out`, or the options of nouns cannot be used.
        ManifestError: there are no tars, or one is compressed or a shard of this project.
        ShardError: a tar that is cut off, damaged, or mixes videos and images; nothing that can be used at all;
            another run in the folder; or one that cannot be written.
    """
    started = time.monotonic()
    out = config.out_dir
    tars = tar_paths(config.manifest)
    if outside := [tar for tar in tars if tar.parent.absolute() != out]:
        raise ConfigError(f"in_place indexes the tars of one folder: {outside[0]} is not in out={config.out}")
    try:
        with _locked(out):
            return _index_all(config, out, tars, on_tar, started)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise ShardError(
            f"cannot index the tars of {out}: {error.strerror or error}{place}; indexes are written beside the tars"
        ) from error


class _Indexed(NamedTuple):
    """What became of a tar; its failures stay in its note, since those of all tars may be many."""

    result: ShardResult
    is_reused: bool


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the folder for this run."""
    (out / NOTES_FOLDER).mkdir(exist_ok=True)
    with (out / NOTES_FOLDER / "_lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"another `alpro shard` is indexing {out}; wait for it to end") from error
        remove_temporaries(out / NOTES_FOLDER)
        yield


def _index_all(
    config: ShardConfig, out: Path, tars: list[Path], on_tar: Callable[[int, int], None], started: float
) -> ShardSummary:
    shards: list[ShardInfo] = []
    nouns: Counter[str] = Counter()
    num_rows, num_reused = 0, 0
    index = _Indexer(config.reading, noun_options(config.entities))
    with ThreadPoolExecutor(config.num_workers or len(os.sched_getaffinity(0))) as pool:  # hashing lets go of the GIL
        for number, (result, is_reused) in enumerate(pool.map(index, tars), 1):
            num_rows += result.num_rows
            num_reused += is_reused
            nouns.update(result.nouns)
            if result.shard is not None:
                shards.append(result.shard)
            on_tar(number, len(tars))
    reasons = ReasonCounts()
    publish_chunks(out / FAILURES_FILE, encode_failures(_failures(tars, reasons)))
    if not shards:
        raise ShardError(
            f"no tar of {config.manifest} has a sample that can be used: {describe_reasons(reasons.by_text())}"
        )
    options = in_place_options(config.payload, config.reading.columns)
    info = DatasetInfo.of_shards(config.reading.split, options, shards)
    save_entities(out / ENTITIES_FILE, vocabulary(nouns, config.entities))
    save_config(config, out / CONFIG_FILE)
    save_dataset_info(out, info)
    return ShardSummary(
        out=out,
        splits={config.reading.split: info},
        num_rows=num_rows,
        num_samples=info.num_samples,
        num_failures=num_rows - info.num_samples,
        failures_by_reason=reasons.by_text(),
        num_duplicate_media=0,
        num_duplicate_captions=0,
        num_shards=len(shards),
        num_shards_reused=num_reused,
        report=None,
        seconds=time.monotonic() - started,
    )


def _failures(tars: Iterable[Path], reasons: ReasonCounts) -> Iterator[tuple[str, Failure]]:
    """Every failure with the name of its tar, from the notes; counted on the way."""
    for tar in tars:
        note = _read_note(_note_path(tar))
        if note is None:
            raise ShardError(f"the note on {tar} disappeared while it was indexed; run the same command again")
        for failure in note[1].failures:
            reasons.add(failure)
            yield tar.name, failure


class _Indexer:
    """Indexes one tar at a time, unless its note says that this was done; called from several threads."""

    def __init__(self, reading: ManifestConfig, nouns: NounOptions) -> None:
        self._reading = reading.model_copy(update={"format": "webdataset"})
        # As plain JSON values, to be compared with a note; the media are in the tar, whatever the root.
        options = {"reading": self._reading.model_dump(mode="json", exclude={"media_root"}), "nouns": asdict(nouns)}
        self._options: dict[str, Any] = json.loads(json.dumps(options))
        self._nouns = noun_counter(nouns)
        self._lock = threading.Lock()

    def __call__(self, tar: Path) -> _Indexed:
        """What became of a tar, without its failures."""
        path, state = _note_path(tar), tar.stat()
        made_for = {**self._options, "tar": {"num_bytes": state.st_size, "mtime_ns": state.st_mtime_ns}}
        note = _read_note(path)
        if note is not None and note[0] == made_for and _has_index(tar, note[1]):
            return _Indexed(replace(note[1], failures=()), is_reused=True)
        # A note that is there always describes the index beside the tar, at whatever moment this process dies.
        path.unlink(missing_ok=True)
        result = _index(tar, self._reading, self._count_nouns)
        publish_bytes(path, json.dumps({"for": made_for, "result": result.to_values()}).encode())
        return _Indexed(replace(result, failures=()), is_reused=False)

    def _count_nouns(self, captions: Iterable[str]) -> Counter[str]:
        with self._lock:  # taggers load their tables when first used, and do not expect two threads
            return self._nouns(captions)


def _note_path(tar: Path) -> Path:
    return tar.parent / NOTES_FOLDER / f"{tar.stem}.json"


def _read_note(path: Path) -> tuple[dict[str, Any], ShardResult] | None:
    """What a note was made for, and the result; None when there is nothing that can be read."""
    try:
        values = json.loads(path.read_bytes())
        return values["for"], ShardResult.from_values(values["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_index(tar: Path, result: ShardResult) -> bool:
    return result.shard is None or index_path(tar.parent, tar.stem).is_file()


def _index(tar: Path, reading: ManifestConfig, count_nouns: CountNouns) -> ShardResult:
    started = time.monotonic()
    samples = read_tar(tar, reading)
    failures = [Failure(row.line, row.id, tar.name, "manifest", row.reason) for row in samples.rejected]
    nouns: Counter[str] = Counter()
    for row in samples.rows:
        nouns.update(count_nouns(row.captions))
    shard = None
    if samples.kind is not None:
        publish_bytes(index_path(tar.parent, tar.stem), format_index(samples.members))
        shard = samples.describe(tar, file_digest(tar))
    work = Work(platform.node(), time.monotonic() - started, 0.0, 0.0, 0.0, 0.0)
    return ShardResult(len(samples.rows) + len(failures), shard, tuple(failures), dict(nouns), Statistics(), work)
