"""What results of benchmarks tell a forecast, in place of the table's figures.

| results of | what is taken |
|---|---|
| `forecast` | all rates of a machine, for each number of ranks that it was measured with |
| `step` | on a GPU the share of its peak; on a CPU the rates at the size of the published model |
| `stream`, `decode` | seconds of a core for a clip; `stream` also the bytes of a clip |
| `end_to_end` | what a step takes beside its parts |
| `checkpoint` | how fast a checkpoint is saved, while the trainer waits |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpro_launch.forecast.devices import Precision
from alpro_launch.forecast.parts import Parts, parts_of
from alpro_launch.forecast.rates import MeasuredRates, fitted_rates
from alpro_launch.forecast.work import Sizes, Work, work_of
from alpro_stream.errors import ConfigError
from alpro_stream.model.alpro import Heads, ModelConfig
from alpro_stream.model.operations import pretraining_operations
from alpro_stream.run import RunConfig

READ = ("forecast", "step", "stream", "decode", "end_to_end", "checkpoint")
_STEP_TOKENS, _STEP_WORDS, _STEP_ENTITIES, _STEP_BATCH = 30, 30522, 1000, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured; None or nothing where no file says it.

    Attributes:
        machine: that the rates are from, for people.
        gpus: names of its GPUs.
        num_cores: that it has.
        parts: by number of ranks.
        step_rates: of a CPU, from `step`.
        flops_per_s: of a GPU, executed at the published size.
        precision: number format of that.
        clip_s: of a core for a clip of four stored frames, by augmentation.
        video_s: of a core for a clip out of a stored video.
        clip_bytes: read of a clip.
        rest_s: of a step beside its parts.
        save_per_s: bytes of a checkpoint a second.
        taken: what was taken from which file.
    """

    machine: str = ""
    gpus: Sequence[str] = ()
    num_cores: float = 1.0
    parts: Mapping[int, Parts] = field(default_factory=dict)
    step_rates: MeasuredRates | None = None
    flops_per_s: float | None = None
    precision: Precision | None = None
    clip_s: Mapping[str, float] = field(default_factory=dict)
    video_s: float | None = None
    clip_bytes: float | None = None
    rest_s: float | None = None
    save_per_s: float | None = None
    taken: Sequence[str] = ()


def read_measured(paths: Sequence[Path]) -> Measured:
    """What the files say together; of two that say the same, the later one.

    Raises:
        ConfigError: a file is missing, holds no results, or those of a benchmark that says nothing here; or two files
            are from different machines.
    """
    found: dict[str, Any] = {}
    taken: list[str] = []
    for path in paths:
        result = _read(path)
        machine, gpus = _machine(result, path)
        name = result["benchmark"]
        try:
            new = _TAKE[name]({row["name"]: row for row in result["rows"]}, bool(gpus))
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ConfigError(
                f"{path}: results of {name} without {error}: measured by another version, or cut short; run "
                f"`alpro bench {name} --json FILE` again"
            ) from error
        if name in ("forecast", "step"):  # The others are the same on machines that differ in their GPU.
            if found.get("machine", machine) != machine:
                raise ConfigError(
                    f"{path} was measured on {machine}, and a file before it on {found['machine']}: rates of one "
                    "forecast are from one machine; leave one of them out"
                )
            found |= {"machine": machine, "gpus": gpus, "num_cores": float(result["machine"]["num_cores"])}
        found |= new
        taken.append(f"{name}: {', '.join(sorted(new))} ({path}, {machine})")
    return Measured(**found, taken=tuple(taken))


def _read(path: Path) -> dict[str, Any]:
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--measured {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--measured {path} is no JSON: {error}") from error
    rows = result.get("rows") if isinstance(result, dict) else None
    is_result = isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows)
    if not isinstance(result, dict) or not is_result or "benchmark" not in result:
        raise ConfigError(f"--measured {path} holds no results; make them with `alpro bench NAME --json FILE`")
    if result["benchmark"] not in _TAKE:
        raise ConfigError(
            f"--measured {path}: results of {result['benchmark']}, which say nothing about a step; those of "
            f"{', '.join(READ)} do"
        )
    return result


def _machine(result: Mapping[str, Any], path: Path) -> tuple[str, list[str]]:
    machine = result.get("machine")
    if not isinstance(machine, dict) or not {"cpu", "num_cores", "gpus"} <= machine.keys():
        raise ConfigError(
            f"--measured {path} does not say on which machine; make it with `alpro bench NAME --json FILE`"
        )
    gpus = [str(gpu["name"]) for gpu in machine["gpus"]]
    name = f"{machine['num_cores']:g} cores ({machine['cpu']})"
    return name + (f" with {', '.join(gpus)}" if gpus else ""), gpus


def _forecast(rows: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    parts = parts_of(rows.values())
    if not parts:
        raise KeyError("parts")
    return {"parts": parts}


def _step(rows: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """At the published size, which is checked by its operations; the batch is the benchmark's own."""
    model, heads = ModelConfig(), Heads.of("pretrain", _STEP_ENTITIES)
    operations = pretraining_operations(model, _STEP_TOKENS, _STEP_WORDS, heads).step
    measured = rows["operations of a sample"]["value"] * 1e9
    if abs(measured / operations - 1) > 0.01:
        raise ConfigError(
            f"the step that was measured has {measured / 1e9:.4g} GFLOP a sample, and the published one "
            f"{operations / 1e9:.4g}: measure it without --small"
        )
    work, per_s = _published_work(), float(rows["samples"]["value"])
    if on_gpu:
        # The utilisation is only given where the peak is known, and that is in bf16.
        return {"flops_per_s": work.flops / _STEP_BATCH * per_s, "precision": "bf16" if "MFU" in rows else "fp32"}
    products = {model.video.width: rows["operations"]["limit"] * 1e9}
    return {"step_rates": fitted_rates(products, [(work, model.video.width, _STEP_BATCH / per_s)])}


def _published_work() -> Work:
    """Of the step that `benchmarks/step.py` measures."""
    config = RunConfig.model_validate(
        {
            "task": "pretrain",
            "run_dir": "unused",
            "stream": {"sources": [{"path": "unused"}], "text": {"tokenizer": "unused", "num_tokens": _STEP_TOKENS}},
            "prompter": {"checkpoint": "unused"},
        }
    )
    sizes = Sizes(_STEP_WORDS, _STEP_ENTITIES, 0, config.model)
    work = work_of(config, sizes, {"video": 1.0}).of("video", _STEP_BATCH)
    return work.forward + work.backward + work.labels


_CLIP_ROWS = {"": "none", ", published augmentation": "published", ", increasing augmentation": "increasing"}


def _cpu_s(rows: Mapping[str, Any], name: str) -> float:
    return float(rows[name]["details"]["CPU ms/clip"]) / 1e3


def _decode(rows: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    names = {augment: f"libjpeg-turbo{suffix}" for suffix, augment in _CLIP_ROWS.items()}
    return {"clip_s": {augment: _cpu_s(rows, name) for augment, name in names.items() if name in rows}}


def _stream(rows: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    names = {augment: f"stream, libjpeg-turbo{suffix}" for suffix, augment in _CLIP_ROWS.items()}
    videos = "stream, stored videos"
    return {
        "clip_s": {augment: _cpu_s(rows, name) for augment, name in names.items() if name in rows},
        "clip_bytes": float(rows[names["none"]]["details"]["kB/clip"]) * 1e3,
        **({"video_s": _cpu_s(rows, videos)} if videos in rows else {}),
    }


def _end_to_end(rows: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    return {"rest_s": max(0.0, float(rows["rest"]["value"]) / 1e3)}


def _checkpoint(rows: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """The slowest of the sizes that were saved."""
    rates = [float(row["value"]) for name, row in rows.items() if name.startswith("save, ")]
    if not rates:
        raise KeyError("save")
    return {"save_per_s": min(rates) * 1e6}


_TAKE = {
    "forecast": _forecast,
    "step": _step,
    "stream": _stream,
    "decode": _decode,
    "end_to_end": _end_to_end,
    "checkpoint": _checkpoint,
}
