"""The grid as a list of jobs: which command, with which overrides, writing where, after which other job."""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpro_launch.ablate.config import AblateConfig, Row, Stage
from alpro_stream.config import Config, load_config, read_config
from alpro_stream.errors import ConfigError

# Imported when they are needed: that of a training imports torch.
_MODELS = {
    "corpus": ("alpro_stream.testing.glyphs.corpus", "CorpusConfig"),
    "shard": ("alpro_sharding.config", "ShardConfig"),
    "starting-weights": ("alpro_launch.starting_weights", "StartingWeightsConfig"),
    "train": ("alpro_stream.run", "RunConfig"),
    "embed": ("alpro_stream.evaluate.embed_config", "EmbedConfig"),
}


@dataclass(frozen=True)
class Job:
    """A stage of one seed, or of one row and seed.

    Attributes:
        seed: of it.
        row: name; empty for a stage that is run once for all rows.
        stage: name.
        arguments: of `alpro`: command, configuration file, overrides.
        folder: of its row and seed, or of its seed.
        output: what it writes, inside of that folder.
        digest: of command and resolved configuration, and of the jobs before it; places count relative to `out`.
        after: the job that must be done first.
        held_back: whether it looks at the test split.
    """

    seed: int
    row: str
    stage: str
    arguments: tuple[str, ...]
    folder: Path
    output: Path
    digest: str
    after: "Job | None"
    held_back: bool

    @property
    def makes_something(self) -> bool:
        """Whether other jobs may need what it writes."""
        return self.arguments[0] != "evaluate"

    @property
    def title(self) -> str:
        """What to call it."""
        return f"seed {self.seed}, {self.row + ': ' if self.row else ''}{self.stage}"

    @property
    def record(self) -> Path:
        """File that says how far it is."""
        return self.folder / "stages" / f"{self.stage}.json"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.record.with_suffix(".log")


def make_jobs(config: AblateConfig, find: Callable[[str], str] = str) -> list[Job]:
    """All jobs, each behind the one that it needs: those of all rows first, then seed by seed.

    Args:
        config: of the ablation.
        find: from the name of a configuration file to its path.

    Raises:
        ConfigError: a stage cannot be read, would write outside of its folder or over another one, or two rows or two
            seeds are the same run.
    """
    stages = {name: stage.model_copy(update={"config": find(stage.config)}) for name, stage in config.stages.items()}
    rows = config.all_rows()
    _refuse_repeats(stages, rows, config.seeds)
    shared = {name: stage for name, stage in stages.items() if stage.once}
    own = {name: stage for name, stage in stages.items() if not stage.once}
    jobs: list[Job] = []
    last_shared: dict[int, Job | None] = {}
    for seed in config.seeds:
        chain = _chain(config.out, seed, None, shared, None)
        last_shared[seed] = next((job for job in reversed(chain) if job.makes_something), None)
        jobs += chain
    for seed in config.seeds:
        for row in rows:
            jobs += _chain(config.out, seed, row, own, last_shared[seed])
    _refuse_shared_outputs(jobs)
    return jobs


def grid_digest(jobs: Sequence[Job], choose: str | None) -> str:
    """Of everything that is run, and of how rows are chosen."""
    return _digest([sorted([job.seed, job.row, job.stage, job.digest] for job in jobs), choose])


def _chain(out: Path, seed: int, row: Row | None, stages: Mapping[str, Stage], before: Job | None) -> list[Job]:
    """Each needs the last one before it that is no evaluation: nothing is made from a result."""
    jobs: list[Job] = []
    for name, stage in stages.items():
        job = _job(out, seed, row, name, stage, before)
        jobs.append(job)
        before = job if job.makes_something else before
    return jobs


def _job(out: Path, seed: int, row: Row | None, name: str, stage: Stage, before: Job | None) -> Job:
    names = _names(out, seed, row)
    overrides = _overrides(name, stage, row, names)
    folder = Path(str(names["row_dir" if row else "work_dir"]))
    loaded: Any = _load(stage, overrides)
    output = Path(loaded.run_dir if hasattr(loaded, "run_dir") else loaded.out)
    if folder.resolve() not in output.resolve().parents:
        place = "row_dir" if row else "work_dir"
        raise ConfigError(
            f"{stage.config}: stage {name} writes to {output}, which is not inside of {folder}: have `{place}: ...` at "
            f"the top level of the file, and use ${{{place}}} in its run_dir or out"
        )
    # Relative to `out`, so that a folder that is moved stays what it is.
    values = read_config(stage.config, _overrides(name, stage, row, _names(Path(), seed, row)))
    return Job(
        seed=seed,
        row=row.name if row else "",
        stage=name,
        arguments=(stage.command, stage.config, *overrides),
        folder=folder,
        output=output,
        digest=_digest([stage.command, values, before.digest if before else ""]),
        after=before,
        held_back=stage.held_back,
    )


def _names(out: Path, seed: int, row: Row | None) -> dict[str, object]:
    """What `${work_dir}`, `${row_dir}` and `${seed}` stand for."""
    work_dir = out / f"seed{seed}"
    return {"work_dir": work_dir, "seed": seed} | ({"row_dir": work_dir / "rows" / row.folder} if row else {})


def _overrides(name: str, stage: Stage, row: Row | None, names: Mapping[str, object]) -> list[str]:
    """Of a stage and a row, behind those names that the file has."""
    own = [*stage.overrides, *(row.overrides.get(name, ()) if row else ())]
    known = read_config(stage.config, own).keys()
    return [*(f"{key}={value}" for key, value in names.items() if key in known), *own]


def _load(stage: Stage, overrides: Sequence[str]) -> Config:
    """The configuration as the command reads it."""
    if stage.command == "evaluate":
        from alpro_launch.evaluate import load_evaluation

        return load_evaluation(stage.config, overrides)
    if stage.command not in _MODELS:
        known = ", ".join([*_MODELS, "evaluate"])
        raise ConfigError(f"no stage can be `alpro {stage.command}`; expected one of {known}")
    module, name = _MODELS[stage.command]
    model: type[Config] = getattr(importlib.import_module(module), name)
    return load_config(model, stage.config, overrides)


def _refuse_repeats(stages: Mapping[str, Stage], rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Two rows, or two seeds, that differ in nothing but their folders are one run made twice."""

    def settings(row: Row, seed: int) -> str:
        names = {"work_dir": "work", "row_dir": "row", "seed": seed}
        configs = [_load(stage, _overrides(name, stage, row, names)) for name, stage in stages.items()]
        return _digest([config.model_dump(mode="json") for config in configs])

    by_row: dict[str, str] = {}
    for row in rows:
        first = by_row.setdefault(settings(row, seeds[0]), row.name)
        if first != row.name:
            raise ConfigError(f"rows {first!r} and {row.name!r} have the same settings, which is one run; remove one")
    by_seed: dict[str, int] = {}
    for seed in seeds:
        same = by_seed.setdefault(settings(rows[0], seed), seed)
        if same != seed:
            raise ConfigError(
                f"seeds {same} and {seed} give the same settings in every stage, which is one run: have `seed: 0` at "
                "the top level of the configuration files, and use it, as in `stream.seed: ${seed}`"
            )


def _refuse_shared_outputs(jobs: Sequence[Job]) -> None:
    """What is run again is removed first, which must not touch another job."""
    by_output: dict[Path, Job] = {}
    for job in jobs:
        other = by_output.setdefault(job.output.resolve(), job)
        if other is not job:
            raise ConfigError(f"{other.title} and {job.title} both write to {job.output}; give each its own folder")
    for output, job in by_output.items():
        for parent in output.parents:
            if parent in by_output:
                raise ConfigError(
                    f"{job.title} writes to {output}, inside of {parent}, to which {by_output[parent].title} writes; "
                    "give each its own folder"
                )


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
