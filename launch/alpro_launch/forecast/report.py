"""A forecast as plain values, and as the tables that a terminal shows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from alpro_launch.forecast.facts import Facts
from alpro_launch.forecast.machine import Machine
from alpro_launch.forecast.scaling import ScalingRow
from alpro_launch.forecast.step import StepForecast

_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """All that is said of a run.

    Attributes:
        machine: that every rank works on.
        facts: of sizes and data.
        step: on the GPUs that were asked for.
        num_steps: of the run; None where that is not known.
        checkpoints_s: that the trainer waits for them; None where that is not known.
        sentence: what to change.
        strong: the same batch on other numbers of GPUs.
        weak: the same batch of a GPU on other numbers of them.
        notes: what is not known or was assumed.
        taken: which figures are measured.
        decodes_on_gpu: whether the GPU of a rank decodes.
    """

    machine: Machine
    facts: Facts
    step: StepForecast
    num_steps: int | None
    checkpoints_s: float | None
    sentence: str
    strong: Sequence[ScalingRow]
    weak: Sequence[ScalingRow]
    notes: Sequence[str]
    taken: Sequence[str]
    decodes_on_gpu: bool

    @property
    def epoch_s(self) -> float | None:
        """Of one pass through the data, without checkpoints."""
        steps = self.facts.data.steps_per_epoch
        return None if steps is None else steps * self.step.step_s

    @property
    def run_s(self) -> float | None:
        """Of the whole run."""
        return None if self.num_steps is None else self.num_steps * self.step.step_s + (self.checkpoints_s or 0.0)

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        return None if self.run_s is None else self.run_s / _HOUR_S * self.step.layout.num_ranks

    @property
    def storage_per_s(self) -> float | None:
        """Bytes a second that all nodes together read."""
        each = self.facts.data.clip_bytes
        return None if each is None else each * self.step.clips_per_s

    @property
    def fits(self) -> bool | None:
        """Whether a GPU has the memory; None on a CPU."""
        device = self.machine.memory_bytes
        return None if device is None else self.step.memory.fits(device)


def as_json(forecast: Forecast) -> dict[str, Any]:
    """All figures as plain values, in seconds, bytes and operations."""
    step, data = forecast.step, forecast.facts.data
    return {
        "machine": forecast.machine.name,
        "layout": {**asdict(step.layout), "num_nodes": step.layout.num_nodes},
        "step_s": step.step_s,
        "parts_s": dict(step.parts),
        "beside_s": dict(step.beside),
        "clips_per_s": step.clips_per_s,
        "operations_per_rank": step.operations,
        "executed_per_rank": step.flops,
        "utilisation": step.utilisation,
        "sent_bytes_per_rank": step.traffic.total_bytes,
        "bottleneck": forecast.sentence,
        "clip_bytes": data.clip_bytes,
        "storage_bytes_per_s": forecast.storage_per_s,
        "num_steps": forecast.num_steps,
        "epoch_s": forecast.epoch_s,
        "checkpoints_s": forecast.checkpoints_s,
        "run_s": forecast.run_s,
        "gpu_hours": forecast.gpu_hours,
        "memory_bytes": {**asdict(step.memory), "total": step.memory.total},
        "device_memory_bytes": forecast.machine.memory_bytes,
        "fits": forecast.fits,
        "strong_scaling": [_scaling_json(row) for row in forecast.strong],
        "weak_scaling": [_scaling_json(row) for row in forecast.weak],
        "assumed": list(forecast.notes),
        "measured": list(forecast.taken),
    }


def show(forecast: Forecast, console: Console) -> None:
    """Prints it."""
    step = forecast.step
    layout = step.layout
    where = f"{layout.num_nodes} x {layout.ranks_per_node} {forecast.machine.name}"
    console.print(_step_table(step, f"a step of {layout.global_batch} samples on {where}"))
    console.print(_table("the run", _run_lines(forecast)))
    console.print(_table("memory of a GPU, estimated", _memory_lines(forecast)))
    for title, rows in (("strong: the same batch", forecast.strong), ("weak: the same of a GPU", forecast.weak)):
        if rows:
            console.print(_scaling_table(f"scaling, {title}", rows, forecast.machine.memory_bytes))
    _say(console, forecast.sentence)
    for what, texts in (("measured", forecast.taken), ("assumed", forecast.notes)):
        for text in texts:
            _say(console, f"{what}: {text}")
    if forecast.fits is False:
        _say(console, f"does not fit: {_memory_remedy(forecast)}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _step_table(step: StepForecast, title: str) -> Table:
    table = _empty(title, "", "ms", "of the step")
    for name, spent in step.parts.items():
        if spent:
            table.add_row(name, *_spent(spent, step.step_s))
    for name, spent in step.beside.items():
        table.add_row(f"beside: {name}", *_spent(spent, step.step_s))
    table.add_row("step", *_spent(step.step_s, step.step_s), style="bold")
    return table


def _spent(seconds: float, step_s: float) -> tuple[str, str]:
    return f"{1e3 * seconds:,.1f}", f"{100 * seconds / step_s:.0f} %"


def _run_lines(forecast: Forecast) -> Mapping[str, str]:
    step, data = forecast.step, forecast.facts.data
    num_ranks, num_nodes = step.layout.num_ranks, step.layout.num_nodes
    sent = step.traffic.total_bytes
    mfu = f", {100 * step.utilisation:.0f} % of the peak (MFU)" if step.utilisation is not None else ""
    lines = {
        "throughput": f"{step.clips_per_s:,.0f} clips/s, {step.clips_per_s / num_ranks:,.1f} a GPU",
        "operations of a step": f"{step.operations / 1e12:,.2f} TFLOP a GPU ({step.flops / 1e12:,.2f} executed){mfu}",
    }
    if num_ranks > 1:
        lines["sent by a rank in a step"] = f"{sent / 1e6:,.0f} MB"
    needed = forecast.storage_per_s
    if needed is not None:
        each = f", {needed / 1e6 / num_nodes:,.1f} a node" if num_nodes > 1 else ""
        lines["storage must give"] = f"{needed / 1e6:,.1f} MB/s{each} ({(data.clip_bytes or 0) / 1e3:,.1f} kB a clip)"
    lines["decoding"] = _decoding(forecast)
    if forecast.epoch_s is not None and data.steps_per_epoch is not None:
        lines["an epoch"] = f"{data.steps_per_epoch:,.0f} steps, {_duration(forecast.epoch_s)}"
    if forecast.run_s is not None and forecast.gpu_hours is not None:
        saved = "" if forecast.checkpoints_s is None else f", {_duration(forecast.checkpoints_s)} of it for checkpoints"
        lines["the whole run"] = f"{forecast.num_steps:,} steps, {_duration(forecast.run_s)}{saved}"
        lines["GPU-hours"] = f"{forecast.gpu_hours:,.1f}"
    return lines


def _decoding(forecast: Forecast) -> str:
    """What decoding has to do; how fast a GPU decodes is nowhere published for such pictures."""
    step, machine = forecast.step, forecast.machine
    each = f"{step.clips_per_s / step.layout.num_ranks:,.1f} clips/s on each GPU"
    if machine.decode_s is None:
        return f"{each}; how fast it decodes is not known: `alpro preflight` measures it"
    if forecast.decodes_on_gpu:
        return f"{each}, which decodes {1 / machine.decode_s:,.0f}"
    cores = step.clips_per_s * machine.decode_s / step.layout.num_nodes
    return f"{cores:,.1f} cores of a node ({1e3 * machine.decode_s:.2f} ms of a core for a clip)"


def _memory_lines(forecast: Forecast) -> Mapping[str, str]:
    memory = forecast.step.memory
    names = {"context": "CUDA itself", "activations": "activations, roughly", "decoder": "decoding, at the most"}
    lines = {names.get(name, name): _gb(size) for name, size in asdict(memory).items() if size}
    if forecast.machine.memory_bytes is None:
        return {**lines, "together": _gb(memory.total)}
    verdict = "fits" if forecast.fits else "DOES NOT FIT"
    return {**lines, "together": f"{_gb(memory.total)} of {_gb(forecast.machine.memory_bytes)}: {verdict}"}


def _memory_remedy(forecast: Forecast) -> str:
    memory = forecast.step.memory
    if memory.activations >= memory.total / 2:
        return "raise train.engine.num_micro_batches, set train.engine.activation_checkpointing=true, or take more GPUs"
    return "raise train.engine.zero_stage, take more GPUs or larger ones"


def _scaling_table(title: str, rows: Sequence[ScalingRow], device_bytes: float | None) -> Table:
    names = ("GPUs", "batch", "of a GPU", "in parts", "step, ms", "clips/s", "efficiency", "exchange", "memory")
    table = _empty(title, *names)
    for row in rows:
        if row.step is None:
            table.add_row(str(row.num_ranks), "-", "-", "-", "the lanes do not allow it", "-", "-", "-", "-")
            continue
        step = row.step
        exchange = step.parts["gradients between ranks"] + step.parts["features between ranks"]
        table.add_row(
            str(row.num_ranks),
            str(step.layout.global_batch),
            f"{step.layout.rank_batch:g}",
            str(step.layout.num_micro_batches),
            f"{1e3 * step.step_s:,.1f}",
            f"{step.clips_per_s:,.0f}",
            f"{100 * (row.efficiency or 0):.0f} %",
            f"{100 * exchange / step.step_s:.0f} %",
            _gb(step.memory.total) + ("" if device_bytes is None or step.memory.fits(device_bytes) else ": NO"),
        )
    return table


def _scaling_json(row: ScalingRow) -> dict[str, Any]:
    if row.step is None:
        return {"num_ranks": row.num_ranks, "step_s": None}
    return {
        "num_ranks": row.num_ranks,
        "global_batch": row.step.layout.global_batch,
        "step_s": row.step.step_s,
        "clips_per_s": row.step.clips_per_s,
        "efficiency": row.efficiency,
        "memory_bytes": row.step.memory.total,
    }


def _empty(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 and not column else "right")
    return table


def _table(title: str, lines: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for name, text in lines.items():
        table.add_row(name, text)
    return table


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * _HOUR_S else f"{seconds / _HOUR_S:,.1f} h"
