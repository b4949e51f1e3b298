"""The whole of sharding: plan, make what is missing, describe what is there."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alpro_sharding.assign import Group, plan_shards
from alpro_sharding.config import ShardConfig
from alpro_sharding.describe import describe
from alpro_sharding.entities import NounOptions, noun_options
from alpro_sharding.index_in_place import index_in_place
from alpro_sharding.ledger import Ledger, Part, RejectedRows
from alpro_sharding.media_messages import MediaOptions
from alpro_sharding.page import write_pages
from alpro_sharding.ray_job import OnPoll, OnResult, run_tasks
from alpro_sharding.results import Failure, ShardResult
from alpro_sharding.summary import ShardSummary
from alpro_sharding.wordpiece import TOKENIZER_FOLDER, save_tokenizer, train_wordpiece
from alpro_sharding.worker import ShardTask
from alpro_stream.errors import ConfigError, WriteError
from alpro_stream.manifest import (
    IDS_DTYPE,
    ManifestRow,
    RejectedRow,
    media_root,
    read_manifest,
    refuse_repeated,
    survey,
)
from alpro_stream.shards.storage import publish_chunks


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        num_rows: rows of the manifest.
        num_done: rows that need nothing more.
        num_new: of these, the ones that this run has done.
    """

    num_rows: int
    num_done: int
    num_new: int


OnProgress = Callable[[Progress], None]


RunTasks = Callable[[Iterable[ShardTask], int | None, OnResult, OnPoll], None]


def shard(
    config: ShardConfig,
    on_progress: OnProgress = lambda progress: None,
    *,
    retry_failed: bool = False,
    run: RunTasks = run_tasks,
) -> ShardSummary:
    """Turns a manifest into shards. Interrupted at any moment, the same call goes on with what is missing.

    Args:
        config: the options.
        on_progress: called as rows are done.
        retry_failed: try rows again that gave no sample; only shards that gain samples are written again, with the
            bytes of a run in which nothing had failed.
        run: makes the shards; see `run_tasks`, which does it on Ray.

    Raises:
        ManifestError: the manifest cannot be read.
        ShardError: nothing could be written (with the reasons), or the target belongs to another plan.
        ConfigError: a relative `out` inside a submitted Ray job.
    """
    started = time.monotonic()
    _refuse_relative_out_in_job(config)
    if config.in_place:
        if retry_failed:
            raise ConfigError("--retry-failed has nothing to try with in_place: no medium is opened")
        return index_in_place(config, lambda done, total: on_progress(Progress(total, done, done)))
    found = survey(read_manifest(config.manifest, config.reading))
    nouns = noun_options(config.entities)
    with Ledger(config.out_dir, {"options": config.sample_options(), "nouns": asdict(nouns)}) as ledger:
        try:
            part = ledger.open_part(
                Path(config.manifest).name,
                found.digest,
                found.num_rows,
                media_root(config.manifest, config.reading),
                append=config.append,
                moved_media=config.moved_media,
            )
            publish_chunks(ledger.ids_path(part), [found.ids.view(np.uint8).data])
            job = _Job(config, ledger, part, found.repeated, nouns, on_progress, retry_failed)
            del found  # the ids of millions of rows
            run(job.missing_tasks(), config.num_workers, job.finished, job.poll)
            ledger.remove_leftovers()
            tokenizer = _train_tokenizer(config, part)
            account = describe(config, ledger)
            report = write_pages(config, ledger.out, account)
        except OSError as error:
            raise WriteError(f"cannot write to {config.out_dir}: {error.strerror or error}") from error
    num_shards = sum(len(info.shards) for info in account.splits.values())
    return ShardSummary(
        out=config.out_dir,
        splits=account.splits,
        num_rows=account.num_rows,
        num_samples=account.num_samples,
        num_failures=account.num_failures,
        failures_by_reason=account.reasons.by_text(),
        num_duplicate_media=account.num_duplicate_media,
        num_duplicate_captions=account.num_duplicate_captions,
        num_shards=num_shards,
        report=report,
        num_shards_reused=num_shards - job.num_shards_made,
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
    )


class _Job:
    """One run over one manifest."""

    def __init__(
        self,
        config: ShardConfig,
        ledger: Ledger,
        part: Part,
        repeated: NDArray[np.bytes_],
        nouns: NounOptions,
        on_progress: OnProgress,
        retry: bool,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._part = part
        self._repeated = repeated
        self._nouns = nouns
        self._on_progress = on_progress
        self._retry = retry
        self._num_done = 0
        self._num_new = 0
        self.num_shards_made = 0

    def missing_tasks(self) -> Iterator[ShardTask]:
        """Plans the whole manifest and gives the tasks whose result is not in the ledger."""
        options = media_options(self._config)
        directories: dict[str, Path] = {}
        num_shards: dict[Group, int] = {}
        rejected = RejectedRows(self._ledger.rejected_path(self._part))
        rows = self._usable_rows(rejected)
        for planned in plan_shards(rows, self._config.samples_per_shard, self._part.first_numbers):
            group = (planned.split, planned.kind)
            num_shards[group] = num_shards.get(group, 0) + 1
            if planned.split not in directories:
                directories[planned.split] = self._ledger.directory(planned.split)
            result = self._ledger.result(planned.split, planned.name)
            if result is not None and not (self._retry and result.num_to_retry):
                self._count(result.num_rows, is_new=False)
                continue
            yield ShardTask(
                planned=planned,
                media_root=self._part.media_root,
                directory=directories[planned.split],
                note=self._ledger.note(planned.split, planned.name),
                options=options,
                nouns=self._nouns,
                retry=result is not None,
            )
        rejected.publish()
        self._ledger.save_part(replace(self._part, num_shards=num_shards))

    def finished(self, task: ShardTask, result: ShardResult) -> None:
        """Takes note of a shard that a worker made."""
        self.num_shards_made += result.shard is not None
        self._count(result.num_rows, is_new=True)

    def poll(self, running: Sequence[ShardTask]) -> None:
        """Says how far the shards under way are."""
        rows = sum(self._ledger.num_running_rows(task.planned.split, task.planned.name) for task in running)
        self._on_progress(Progress(self._part.num_rows, self._num_done + rows, self._num_new + rows))

    def _usable_rows(self, rejected: RejectedRows) -> Iterator[ManifestRow]:
        earlier = [
            np.memmap(self._ledger.ids_path(part), dtype=IDS_DTYPE, mode="r")
            for part in self._ledger.parts()
            # An empty file, of a manifest without a usable row, cannot be mapped.
            if part.number < self._part.number and self._ledger.ids_path(part).stat().st_size
        ]
        rows = read_manifest(self._config.manifest, self._config.reading)
        for row in refuse_repeated(rows, self._repeated, earlier):
            if isinstance(row, RejectedRow):
                rejected.add(Failure(row.line, row.id, None, "manifest", row.reason))
            elif row.split == TOKENIZER_FOLDER:
                reason = f"the split name {row.split!r} is taken by the trained tokenizer's folder"
                rejected.add(Failure.of_row(row, "manifest", reason))
            else:
                yield row
                continue
            self._count(1, is_new=False)

    def _count(self, num_rows: int, *, is_new: bool) -> None:
        self._num_done += num_rows
        self._num_new += num_rows if is_new else 0
        self._on_progress(Progress(self._part.num_rows, self._num_done, self._num_new))


def media_options(config: ShardConfig) -> MediaOptions:
    """The options that media processes need."""
    return MediaOptions.model_validate(config.model_dump(include=set(MediaOptions.model_fields)))


def _train_tokenizer(config: ShardConfig, part: Part) -> Path | None:
    """Trains the vocabulary on the first manifest; rows that are appended must not change the ids of words."""
    if config.wordpiece is None:
        return None
    directory = config.out_dir / TOKENIZER_FOLDER
    if part.number == 0:
        options = config.wordpiece
        save_tokenizer(train_wordpiece(_texts(config), options.vocab_size, options.extra_texts), directory)
    return directory if directory.is_dir() else None


def _texts(config: ShardConfig) -> Iterator[str]:
    """Captions, questions and answers of all rows that can be read."""
    for row in read_manifest(config.manifest, config.reading):
        if isinstance(row, ManifestRow):
            yield from row.captions
            for question, answer in row.qa:
                yield question
                yield answer


def _refuse_relative_out_in_job(config: ShardConfig) -> None:
    # A submitted job runs in a temporary copy of the checkout, which Ray removes.
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not Path(config.out).is_absolute():
        raise ConfigError(
            f"out is {config.out!r}; in a Ray job give an absolute path that all nodes see: out=/shared/shards"
        )
