"""What an ablation is: stages, rows, seeds, and the figures that are compared."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from alpro_stream.config import Config

_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class Stage(Config):
    """One `alpro` command on one configuration file."""

    command: str
    """Such as `train`; see `alpro_launch.ablate.jobs`."""
    config: str
    """Its file. Of `work_dir`, `row_dir` and `seed` it is given those that it has at its top level."""
    overrides: tuple[str, ...] = ()
    """``key=value``, for all rows."""
    once: Literal["seed"] | None = None
    """`seed`: run once for each seed, for all rows; null: once for each row and seed."""
    held_back: bool = False
    """Run with --test alone, when everything else is done."""


class RowConfig(Config):
    """A row of the table: a name, and for each stage that differs its overrides."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, tuple[str, ...]]

    name: str = Field(min_length=1, max_length=120)
    """As the table shows it."""

    @property
    def overrides(self) -> dict[str, tuple[str, ...]]:
        """By stage."""
        return self.__pydantic_extra__


class Measure(Config):
    """A figure of each row and seed."""

    name: str
    """As the table shows it."""
    stage: str
    """An evaluation."""
    key: str
    """Where the figure stands in the `result.json` of that stage, such as ``metrics.vtm.text_to_video.recall_at_1``."""
    unit: str = ""
    """Shown beside the name."""
    digits: int = Field(default=1, ge=0, le=6)
    """Shown behind the point."""


class CompareConfig(Config):
    """Differences by seed of every row to some of them."""

    baselines: tuple[str, ...] = Field(min_length=1)
    """Names of these rows; each difference is shown once."""
    measures: tuple[str, ...] = ()
    """Names; all of them where none is given."""


class Row(NamedTuple):
    """A row of the grid.

    Attributes:
        name: as the table shows it.
        folder: name of its folder.
        overrides: by stage.
    """

    name: str
    folder: str
    overrides: dict[str, tuple[str, ...]]


class AblateConfig(Config):
    """Everything `alpro ablate` can be told."""

    title: str = "Ablation"
    """Heading of the page."""
    note: str = ""
    """What the figures do not say; shown on the page."""
    out: Path
    """Gets the folders of all runs, the table and the page."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Each row is run with each of them."""
    jobs: int = Field(default=1, ge=1)
    """Stages that run at once; the cores are shared out among them."""
    stages: dict[str, Stage] = Field(min_length=1)
    """In order; each needs those before it, of its own seed and row."""
    rows: tuple[RowConfig, ...] = ()
    """Rows by name."""
    grid: dict[str, dict[str, tuple[Any, ...]]] = Field(default={})
    """Stage, key, values: all combinations are rows too, named by their values."""
    measures: tuple[Measure, ...] = Field(min_length=1)
    """Columns of the table."""
    choose: str | None = None
    """Name of the measure whose largest mean marks a row as chosen; of the validation split."""
    compare: CompareConfig | None = None
    """Which differences are looked at."""

    def all_rows(self) -> list[Row]:
        """Rows that are named, then those of the grid."""
        named = [(row.name, row.overrides) for row in self.rows]
        return [Row(name, _folder(name), overrides) for name, overrides in [*named, *_combinations(self.grid)]]

    @model_validator(mode="after")
    def _stages_are_in_order(self) -> Self:
        for name, stage in self.stages.items():
            if not _STAGE_NAME.fullmatch(name) or name == "name":
                raise ValueError(f"stages: {name!r} is no name of a stage; take lower-case letters, digits, - and _")
            if stage.once and stage.held_back:
                raise ValueError(f"stages.{name}: what is held back is run for each row; remove once or held_back")
        order = [0 if stage.once else 2 if stage.held_back else 1 for stage in self.stages.values()]
        if order != sorted(order):
            raise ValueError("stages: those with once come first, and those with held_back last")
        return self

    @model_validator(mode="after")
    def _rows_are_different(self) -> Self:
        rows = self.all_rows()
        if not rows:
            raise ValueError("there is no row: set rows or grid")
        if seed := _repeated(self.seeds):
            raise ValueError(f"seeds: {seed} is there twice, which would repeat its runs; remove one")
        if name := _repeated(row.name for row in rows):
            raise ValueError(f"two rows are named {name!r}; rename one, or remove it if it is the same")
        if folder := _repeated(row.folder for row in rows):
            raise ValueError(f"two rows have names that give the same folder, {folder!r}; rename one")
        for row in rows:
            for name in row.overrides:
                if name not in self.stages:
                    raise ValueError(f"row {row.name!r}: no stage is named {name!r}; there are {_list(self.stages)}")
                if self.stages[name].once:
                    raise ValueError(
                        f"row {row.name!r} changes stage {name}, which is run once for all rows; remove its once"
                    )
        return self

    @model_validator(mode="after")
    def _figures_are_there(self) -> Self:
        by_name = {measure.name: measure for measure in self.measures}
        if name := _repeated(measure.name for measure in self.measures):
            raise ValueError(f"two measures are named {name!r}; rename one")
        for measure in self.measures:
            stage = self.stages.get(measure.stage)
            if stage is None or stage.command != "evaluate" or stage.once:
                found = (
                    "there is none" if stage is None else "it runs once for all rows" if stage.once else stage.command
                )
                raise ValueError(
                    f"measure {measure.name!r} is of stage {measure.stage!r}, where an evaluation of each row is "
                    f"needed: {found}"
                )
        for name in [*([self.choose] if self.choose else []), *(self.compare.measures if self.compare else ())]:
            if name not in by_name:
                raise ValueError(f"no measure is named {name!r}; there are {_list(by_name)}")
        if self.choose and self.stages[by_name[self.choose].stage].held_back:
            raise ValueError(
                f"choose: {self.choose!r} is of stage {by_name[self.choose].stage}, which is held back: choose by a "
                "measure of the validation split"
            )
        names = [row.name for row in self.all_rows()]
        for baseline in self.compare.baselines if self.compare else ():
            if baseline not in names:
                raise ValueError(f"compare.baselines: no row is named {baseline!r}; there are {_list(names)}")
        return self


def _combinations(grid: dict[str, dict[str, tuple[Any, ...]]]) -> list[tuple[str, dict[str, tuple[str, ...]]]]:
    """Names and overrides of all combinations; a key is shown by its last part where that is clear."""
    axes = [(stage, key, values) for stage, keys in grid.items() for key, values in keys.items()]
    if not axes:
        return []
    last = [key.rpartition(".")[2] for _, key, _ in axes]
    shown = [short if last.count(short) == 1 else key for short, (_, key, _) in zip(last, axes, strict=True)]
    rows = []
    for values in itertools.product(*(values for _, _, values in axes)):
        overrides: dict[str, tuple[str, ...]] = {}
        for (stage, key, _), value in zip(axes, map(_as_text, values), strict=True):
            overrides[stage] = (*overrides.get(stage, ()), f"{key}={value}")
        name = ", ".join(f"{short}={_as_text(value)}" for short, value in zip(shown, values, strict=True))
        rows.append((name, overrides))
    return rows


def _as_text(value: Any) -> str:
    """As an override spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _folder(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", name).strip("-.") or "row"


def _repeated(names: Iterable[Any]) -> str | None:
    """The first that is there twice."""
    return next((str(name) for name, times in Counter(names).items() if times > 1), None)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
