"""The whole of sharding: plan, make what is missing, describe what is there."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from alpro_sharding.assign import plan_shards
from alpro_sharding.config import ShardConfig
from alpro_sharding.ledger import Ledger, digest_manifest
from alpro_sharding.ray_job import run_tasks
from alpro_sharding.report import ShardSummary, count_reasons, describe_reasons
from alpro_sharding.wordpiece import save_tokenizer, train_wordpiece
from alpro_sharding.worker import Failure, FrameOptions, ShardResult, ShardTask
from alpro_stream.config import save_config
from alpro_stream.errors import ConfigError, ShardError
from alpro_stream.manifest import KINDS, Kind, ManifestRow, RejectedRow, read_manifest
from alpro_stream.shards import DatasetInfo, merge_entities, save_dataset_info, save_entities
from alpro_stream.shards.layout import ENTITIES_FILE
from alpro_stream.shards.storage import publish_bytes

FAILURES_FILE = "failures.jsonl"
CONFIG_FILE = "shard_config.yaml"
TOKENIZER_FOLDER = "tokenizer"

OnProgress = Callable[[int, int], None]


def shard(config: ShardConfig, on_progress: OnProgress = lambda done, total: None) -> ShardSummary:
    """Turns a manifest into shards. Interrupted at any moment, the same call goes on with what is missing.

    Args:
        config: the options.
        on_progress: called with the number of rows done and the number of lines of the manifest.

    Raises:
        ManifestError: the manifest cannot be read.
        ShardError: nothing could be written (with the reasons), or the target belongs to another plan.
        ConfigError: a relative `out` inside a submitted Ray job.
    """
    started = time.monotonic()
    _refuse_relative_out_in_job(config)
    manifest = digest_manifest(config.manifest_path)
    plan = {"manifest_sha256": manifest.sha256, **config.sample_options()}
    with Ledger(config.out_dir, plan) as ledger:
        job = _Job(config, ledger, manifest.num_lines, on_progress)
        try:
            run_tasks(job.missing_tasks(), config.num_workers, job.finished)
            return job.describe(started)
        except OSError as error:
            raise ShardError(f"cannot write to {config.out_dir}: {error.strerror or error}") from error


class _Job:
    """One run: what was planned so far and which rows the manifest itself failed."""

    def __init__(self, config: ShardConfig, ledger: Ledger, num_lines: int, on_progress: OnProgress) -> None:
        self._config = config
        self._ledger = ledger
        self._num_lines = num_lines
        self._on_progress = on_progress
        self._num_rows = 0
        self._num_rows_done = 0
        self._num_shards_reused = 0
        self._rejected: list[Failure] = []
        self._planned: list[tuple[str, Kind, int, str]] = []
        self._directories: dict[str, Path] = {}

    def missing_tasks(self) -> Iterator[ShardTask]:
        """Plans the whole manifest and gives the tasks whose result is not in the ledger."""
        frame_options = FrameOptions(
            fps=self._config.fps,
            max_frames=self._config.max_frames,
            size=self._config.size,
            quality=self._config.quality,
        )
        for planned in plan_shards(self._usable_rows(), self._config.samples_per_shard):
            self._planned.append((planned.split, planned.kind, planned.number, planned.name))
            if planned.split not in self._directories:
                self._directories[planned.split] = self._ledger.directory(planned.split)
            result = self._ledger.result(planned.split, planned.name)
            if result is not None:
                self._num_shards_reused += result.shard is not None
                self._count_done(result.num_rows)
                continue
            yield ShardTask(
                planned=planned,
                media_root=str(self._config.manifest_path.parent),
                directory=str(self._directories[planned.split]),
                result_path=str(self._ledger.result_path(planned.split, planned.name)),
                options=frame_options,
            )

    def finished(self, task: ShardTask, result: ShardResult) -> None:
        """Takes note of a shard that a worker made."""
        self._count_done(result.num_rows)

    def describe(self, started: float) -> ShardSummary:
        """Writes what describes the shard set, from the ledger alone, and sums it up."""
        splits: dict[str, DatasetInfo] = {}
        failures = list(self._rejected)
        for split in sorted(self._directories):
            results = self._results(split)
            failures += [failure for result in results for failure in result.failures]
            shards = [result.shard for result in results if result.shard is not None]
            if shards:
                entities = merge_entities((result.nouns.items() for result in results), self._config.num_entities)
                splits[split] = DatasetInfo.of_shards(split, self._config.sample_options(), shards)
                save_entities(self._directories[split] / ENTITIES_FILE, entities)
                save_dataset_info(self._directories[split], splits[split])
        failures.sort(key=lambda failure: failure.line)
        self._write_failures(failures)
        reasons = count_reasons(failures)
        if not splits:
            raise ShardError(
                f"no sample could be made from {self._config.manifest}: {self._num_rows} rows; "
                f"{describe_reasons(reasons) or 'it is empty'}; every row's reason is in "
                f"{self._ledger.out / FAILURES_FILE}"
            )
        save_config(self._config, self._ledger.out / CONFIG_FILE)
        return ShardSummary(
            out=self._ledger.out,
            splits=splits,
            num_rows=self._num_rows,
            num_samples=sum(info.num_samples for info in splits.values()),
            num_failures=len(failures),
            failures_by_reason=reasons,
            num_shards=sum(len(info.shards) for info in splits.values()),
            num_shards_reused=self._num_shards_reused,
            tokenizer=self._train_tokenizer(),
            seconds=time.monotonic() - started,
        )

    def _usable_rows(self) -> Iterator[ManifestRow]:
        for row in read_manifest(self._config.manifest_path):
            self._num_rows += 1
            if isinstance(row, RejectedRow):
                self._reject(Failure(row.line, row.id, None, "manifest", row.reason))
            elif row.split == TOKENIZER_FOLDER:
                reason = f"the split name {row.split!r} is taken by the trained tokenizer's folder"
                self._reject(Failure(row.line, row.id, row.media, "manifest", reason))
            else:
                yield row

    def _reject(self, failure: Failure) -> None:
        self._rejected.append(failure)
        self._count_done(1)

    def _count_done(self, num_rows: int) -> None:
        self._num_rows_done += num_rows
        self._on_progress(self._num_rows_done, self._num_lines)

    def _results(self, split: str) -> list[ShardResult]:
        """The results of a split's shards, videos before images, by number."""
        planned = sorted(
            (KINDS.index(kind), number, name) for of_split, kind, number, name in self._planned if of_split == split
        )
        results = []
        for _, _, name in planned:
            result = self._ledger.result(split, name)
            if result is None:
                raise ShardError(f"{split}/{name} disappeared while sharding; run the same command again")
            results.append(result)
        return results

    def _write_failures(self, failures: list[Failure]) -> None:
        lines = (json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failures)
        # A row's id may hold a lone surrogate, which is one of the reasons to reject it.
        publish_bytes(self._ledger.out / FAILURES_FILE, "".join(lines).encode("utf-8", "backslashreplace"))

    def _train_tokenizer(self) -> Path | None:
        if self._config.wordpiece is None:
            return None
        options = self._config.wordpiece
        directory = self._ledger.out / TOKENIZER_FOLDER
        save_tokenizer(
            train_wordpiece(_texts(self._config.manifest_path), options.vocab_size, options.extra_texts), directory
        )
        return directory


def _texts(manifest: Path) -> Iterator[str]:
    """Captions, questions and answers of all rows that can be read."""
    for row in read_manifest(manifest):
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
