"""What results of benchmarks tell a forecast, in place of the table's figures.

| results of | what is taken |
|---|---|
| `forecast` | all rates of a machine, for each number of ranks that it was measured with |
| `step` | on a GPU the share of its peak; on a CPU the rates at the size of the published model |
| `gpu` | the same share by batch and number format, the rate of its memory, and of its decoder of stored frames |
| `stream`, `decode` | seconds of a core for a clip; `stream` also the bytes of a clip |
| `end_to_end` | what a step takes beside its parts |
| `checkpoint` | how fast a checkpoint is saved, while the trainer waits |
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from alpro_launch.forecast.devices import Precision
from alpro_launch.forecast.parts import Parts, parts_of
from alpro_launch.forecast.rates import MeasuredRates, fitted_rates
from alpro_launch.forecast.work import RunWork, Sizes, Work, work_of
from alpro_stream.errors import ConfigError
from alpro_stream.model.alpro import Heads, ModelConfig
from alpro_stream.model.operations import pretraining_operations
from alpro_stream.run import RunConfig

READ = ("forecast", "gpu", "step", "stream", "decode", "end_to_end", "checkpoint")
_STEP_TOKENS, _STEP_WORDS, _STEP_ENTITIES = 30, 30522, 1000


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step of the published model on a GPU.

    Attributes:
        batch: samples.
        precision: of the products.
        is_compiled: by torch.compile.
        flops_per_s: executed.
    """

    batch: int
    precision: Precision
    is_compiled: bool
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured; None or nothing where no file says it.

    Attributes:
        machine: that the rates are from, for people.
        gpus: names of its GPUs.
        num_cores: that it has.
        parts: by number of ranks.
        step_rates: of a CPU, from `step`.
        steps: of a GPU.
        precision: number format in which rates of a CPU were measured.
        copy_per_s: bytes a second that a copy inside a GPU reads and writes.
        gpu_clip_s: of a GPU to decode a clip of four stored frames, by augmentation.
        clip_s: of a core for a clip of four stored frames, by augmentation.
        video_s: of a core for a clip out of a stored video.
        clip_bytes: read of a clip.
        rest_s: of a step beside its parts.
        save_per_s: bytes of a checkpoint a second.
        taken: benchmark and what was taken from which file, of each.
    """

    machine: str = ""
    gpus: Sequence[str] = ()
    num_cores: float = 1.0
    parts: Mapping[int, Parts] = field(default_factory=dict)
    step_rates: MeasuredRates | None = None
    steps: Sequence[MeasuredStep] = ()
    precision: Precision | None = None
    copy_per_s: float | None = None
    gpu_clip_s: Mapping[str, float] = field(default_factory=dict)
    clip_s: Mapping[str, float] = field(default_factory=dict)
    video_s: float | None = None
    clip_bytes: float | None = None
    rest_s: float | None = None
    save_per_s: float | None = None
    taken: Sequence[tuple[str, str]] = ()


class _Row(BaseModel):
    """A line of results; numbers that were not finite are null in the files."""

    name: str
    value: FiniteFloat | None = None
    limit: FiniteFloat | None = None
    details: dict[str, FiniteFloat | None] = {}


class _Gpu(BaseModel):
    name: str


class _Where(BaseModel):
    cpu: str
    num_cores: float = Field(gt=0)
    gpus: list[_Gpu]


class _Result(BaseModel):
    """What `benchmarks/harness.py` writes, as far as it is read here."""

    benchmark: str
    machine: _Where
    rows: list[_Row]
    content: dict[str, Any] = {}
    quick: bool = False

    def value(self, name: str) -> float:
        """Of a row.

        Raises:
            KeyError: there is no such row, or it has no value.
        """
        return _known(name, self.row(name).value)

    def detail(self, name: str, key: str) -> float:
        """Of what stands beside the value of a row.

        Raises:
            KeyError: there is no such row or detail.
        """
        return _known(f"{name}: {key}", self.row(name).details.get(key))

    def limit(self, name: str) -> float:
        """Of a row.

        Raises:
            KeyError: there is no such row, or it has no limit.
        """
        return _known(f"{name}: limit", self.row(name).limit)

    def has(self, name: str) -> bool:
        """Whether there is such a row."""
        return any(row.name == name for row in self.rows)

    def row(self, name: str) -> _Row:
        """One of them.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


def _known(name: str, value: float | None) -> float:
    """A time or a rate, which is above zero.

    Raises:
        KeyError: it is neither.
    """
    if value is None or value <= 0:
        raise KeyError(name)
    return value


def read_measured(paths: Sequence[Path]) -> Measured:
    """What the files say together; of two that say the same, the later one.

    Raises:
        ConfigError: a file is missing, holds no results, or those of a benchmark that says nothing here; or two files
            are from different machines.
    """
    found: dict[str, Any] = {}
    taken: list[tuple[str, str]] = []
    for path in paths:
        result = _read(path)
        name, gpus = result.benchmark, [gpu.name for gpu in result.machine.gpus]
        machine = f"{result.machine.num_cores:g} cores ({result.machine.cpu})"
        machine += f" with {', '.join(gpus)}" if gpus else ""
        if result.quick:
            raise ConfigError(f"{path} was measured with --quick, at toy size: it says nothing about a step")
        try:
            new = _TAKE[name](result)
        except KeyError as error:
            again = "bash benchmarks/gpu.sh" if name == "gpu" else f"alpro bench {name} --json FILE"
            raise ConfigError(
                f"{path}: results of {name} without a usable {error}: measured by another version, or cut short; run "
                f"`{again}` again"
            ) from error
        if name in ("forecast", "gpu", "step"):  # The others are the same on machines that differ in their GPU.
            if found.get("machine", machine) != machine:
                raise ConfigError(
                    f"{path} was measured on {machine}, and a file before it on {found['machine']}: rates of one "
                    "forecast are from one machine; leave one of them out"
                )
            found |= {"machine": machine, "gpus": gpus, "num_cores": result.machine.num_cores}
        found |= {**new, "steps": [*new.get("steps", ()), *found.get("steps", ())]}
        taken.append((name, f"{name}: {', '.join(sorted(new))} ({path}, {machine})"))
    return Measured(**found, taken=taken)


def _read(path: Path) -> _Result:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--measured {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--measured {path} is no JSON: {error}") from error
    name = values.get("benchmark") if isinstance(values, dict) else None
    if isinstance(name, str) and name not in _TAKE:
        raise ConfigError(
            f"--measured {path}: results of {name}, which say nothing about a step; those of {', '.join(READ)} do"
        )
    try:
        return _Result.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"--measured {path} holds no results ({where}: {first['msg']}); make them with `alpro bench NAME --json "
            "FILE`"
        ) from error


def _forecast(result: _Result) -> dict[str, Any]:
    parts = parts_of({"name": row.name, "value": row.value} for row in result.rows if row.value is not None)
    if not parts:
        raise KeyError("parts")
    return {"parts": parts, "precision": "fp32"}


def _step(result: _Result) -> dict[str, Any]:
    """At the published size, which is checked by its operations."""
    model, heads = ModelConfig(), Heads.of("pretrain", _STEP_ENTITIES)
    operations = pretraining_operations(model, _STEP_TOKENS, _STEP_WORDS, heads).step
    measured = result.value("operations of a sample") * 1e9
    if abs(measured / operations - 1) > 0.01:
        raise ConfigError(
            f"the step that was measured has {measured / 1e9:.4g} GFLOP a sample, and the published one "
            f"{operations / 1e9:.4g}: measure it without --small"
        )
    precision, batch = result.content.get("precision"), result.content.get("batch")
    if precision not in ("fp32", "bf16"):
        raise KeyError("content: precision")
    if not isinstance(batch, int) or batch < 1:
        raise KeyError("content: batch")
    work, per_s = _published_work(batch), result.value("samples")
    if result.machine.gpus:
        compiled = bool(result.content.get("compiled"))
        return {"steps": [MeasuredStep(batch, precision, compiled, work.flops / batch * per_s)]}
    products = {model.video.width: result.limit("operations") * 1e9}
    rates = fitted_rates(products, [(work, model.video.width, batch / per_s)])
    return {"step_rates": rates, "precision": precision}


_GPU_STEP = re.compile(r"step, (bf16|fp32), batch (\d+)(, compiled)?")


def _gpu(result: _Result) -> dict[str, Any]:
    """Of `benchmarks/gpu.sh`, which leaves out what cannot be measured."""
    if not result.machine.gpus:
        raise ConfigError("results of gpu without one, which say nothing about a step; run `bash benchmarks/gpu.sh`")
    steps = []
    for row in result.rows:
        if found := _GPU_STEP.fullmatch(row.name):
            batch, per_s = int(found[2]), result.detail(row.name, "clips/s")
            precision: Precision = "bf16" if found[1] == "bf16" else "fp32"
            flops = _published_work(batch).flops / batch
            steps.append(MeasuredStep(batch, precision, found[3] is not None, flops * per_s))
    if not steps:
        raise KeyError("step")
    taken: dict[str, Any] = {"steps": steps}
    if result.has("copy on the device"):
        taken["copy_per_s"] = result.value("copy on the device") * 1e9
    names = {"none": "frames, DALI mixed", "published": "frames, DALI mixed, published augmentation"}
    taken["gpu_clip_s"] = {augment: 1 / result.value(name) for augment, name in names.items() if result.has(name)}
    return taken


def _published_work(batch: int) -> Work:
    """Of the step that `benchmarks/step.py` measures."""
    work = _published_run().of("video", batch)
    return work.forward + work.backward + work.labels


@cache
def _published_run() -> RunWork:
    config = RunConfig.model_validate(
        {
            "task": "pretrain",
            "run_dir": "unused",
            "stream": {"sources": [{"path": "unused"}], "text": {"tokenizer": "unused", "num_tokens": _STEP_TOKENS}},
            "prompter": {"checkpoint": "unused"},
        }
    )
    sizes = Sizes(_STEP_WORDS, _STEP_ENTITIES, 0, config.model)
    return work_of(config, sizes, {"video": 1.0})


_CLIP_ROWS = {"": "none", ", published augmentation": "published", ", increasing augmentation": "increasing"}


def _cpu_s(result: _Result, name: str) -> float:
    return result.detail(name, "CPU ms/clip") / 1e3


def _decode(result: _Result) -> dict[str, Any]:
    names = {augment: f"libjpeg-turbo{suffix}" for suffix, augment in _CLIP_ROWS.items()}
    return {"clip_s": {augment: _cpu_s(result, name) for augment, name in names.items() if result.has(name)}}


def _stream(result: _Result) -> dict[str, Any]:
    names = {augment: f"stream, libjpeg-turbo{suffix}" for suffix, augment in _CLIP_ROWS.items()}
    videos = "stream, stored videos"
    return {
        "clip_s": {augment: _cpu_s(result, name) for augment, name in names.items() if result.has(name)},
        "clip_bytes": result.detail(names["none"], "kB/clip") * 1e3,
        **({"video_s": _cpu_s(result, videos)} if result.has(videos) else {}),
    }


def _end_to_end(result: _Result) -> dict[str, Any]:
    value = result.row("rest").value
    if value is None:
        raise KeyError("rest")
    return {"rest_s": max(0.0, value / 1e3)}  # A difference: noise may have made it negative.


def _checkpoint(result: _Result) -> dict[str, Any]:
    """The slowest of the sizes that were saved."""
    rates = [result.value(row.name) for row in result.rows if row.name.startswith("save, ")]
    if not rates:
        raise KeyError("save")
    return {"save_per_s": min(rates) * 1e6}


_TAKE = {
    "forecast": _forecast,
    "gpu": _gpu,
    "step": _step,
    "stream": _stream,
    "decode": _decode,
    "end_to_end": _end_to_end,
    "checkpoint": _checkpoint,
}
