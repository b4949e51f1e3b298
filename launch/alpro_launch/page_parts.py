"""What the pages of runs share: curves and totals from the lines of metrics, the size of a model, and the file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open

from alpro_stream.pages import LossCurve

Lines = Sequence[Mapping[str, Any]]

_LOSSES = {
    "vtc": "video-text contrastive",
    "vtm": "video-text matching",
    "mlm": "masked language modelling",
    "pem": "prompting entity modelling",
}
_SPEED = {
    "clips_per_s": ("Clips per second", "over all ranks"),
    "data_wait_percent": ("Waiting for data", "per cent of a step"),
    "prompter_wait_percent": ("Waiting for the prompter", "per cent of a step"),
    "step_s": ("Time of a step", "in seconds"),
    "tflops": ("Operations", "10\u00b9\u00b2 a second on each rank"),
    "mfu_percent": ("Use of the device (MFU)", "per cent of its peak"),
}
_ENTITIES = {
    "pem/kept": ("Clips kept", "share whose best entity is probable enough"),
    "pem/entropy": ("Entropy", "of the soft labels, in nats"),
    "pem/top_probability": ("Best entity", "its mean probability"),
}


@dataclass(frozen=True, slots=True)
class Totals:
    """Figures of a whole run; None where its metrics do not tell.

    Attributes:
        num_steps: the last step of which there is a line.
        seconds: of its steps; of those without a line, as long as the others took.
        clips_per_s: over all steps.
        data_wait: share of the time, 0 to 1.
        prompter_wait: share of the time, 0 to 1.
        mfu: share of the device's peak, 0 to 1.
    """

    num_steps: int
    seconds: float | None
    clips_per_s: float | None
    data_wait: float | None
    prompter_wait: float | None
    mfu: float | None


def totals(lines: Lines) -> Totals:
    """The figures of a run; lines that lack one are left out of it."""
    num_steps = int(lines[-1]["step"]) if lines else 0
    step_s = [line["step_s"] for line in lines if "step_s" in line]
    waits = {what: _mean_over_time(lines, f"{what}_percent") for what in ("data_wait", "prompter_wait", "mfu")}
    return Totals(
        num_steps=num_steps,
        seconds=num_steps * math.fsum(step_s) / len(step_s) if step_s else None,
        clips_per_s=_mean_over_time(lines, "clips_per_s"),
        **{what: None if percent is None else percent / 100 for what, percent in waits.items()},
    )


def _mean_over_time(lines: Lines, name: str) -> float | None:
    """Each step counts by the time it took."""
    known = [line for line in lines if name in line and "step_s" in line]
    seconds = math.fsum(line["step_s"] for line in known)
    return math.fsum(line[name] * line["step_s"] for line in known) / seconds if seconds else None


def loss_curves(lines: Lines, stage: str, global_batch: int | None) -> tuple[LossCurve, ...]:
    """The terms of the loss.

    Args:
        lines: of metrics.jsonl.
        stage: the training they belong to.
        global_batch: tells what guessing gives for VTC; None if it is not known.
    """
    # What guessing gives: one of the global batch for VTC, one match in three pairs for VTM.
    guessing = {"vtm": math.log(3) - 2 / 3 * math.log(2)}
    if global_batch is not None:
        guessing["vtc"] = math.log(global_batch)
    curves = []
    for key in _keys(lines, "loss/", [f"loss/{name}" for name in _LOSSES]):
        name = key.removeprefix("loss/")
        text = _LOSSES.get(name, "")
        curves.append(_curve(lines, key, name.upper(), text, stage=stage, reference=guessing.get(name)))
    return tuple(curves)


def speed_curves(lines: Lines) -> tuple[LossCurve, ...]:
    """Waits, clips a second and use of the device; the wait for the prompter only if there ever was one."""
    curves = [_curve(lines, key, *words) for key, words in _SPEED.items() if key in _keys(lines)]
    return tuple(curve for curve in curves if curve.name != _SPEED["prompter_wait_percent"][0] or any(curve.values))


def optimizer_curves(lines: Lines) -> tuple[LossCurve, ...]:
    """Learning rate and norm of the gradient."""
    known = _keys(lines)
    rate = [_curve(lines, "learning_rate", "Learning rate", smooth=False)] if "learning_rate" in known else []
    norm = [_curve(lines, "gradient_norm", "Norm of the gradient", "before clipping")]
    return (*rate, *(norm if "gradient_norm" in known else []))


def validation_curves(lines: Lines) -> tuple[LossCurve, ...]:
    """Everything under ``validation/``."""
    names = {key: key.removeprefix("validation/") for key in _keys(lines, "validation/")}
    return tuple(
        _curve(lines, key, name.upper() if name in _LOSSES else name.replace("_", " "), smooth=False)
        for key, name in names.items()
    )


def entity_curves(lines: Lines) -> tuple[LossCurve, ...]:
    """Everything under ``pem/`` that is a number."""
    keys = [key for key in _ENTITIES if key in _keys(lines)]
    keys += [key for key in _keys(lines, "pem/") if key not in keys]
    return tuple(_curve(lines, key, *_ENTITIES.get(key, (key.removeprefix("pem/").replace("_", " "),))) for key in keys)


def top_entities(lines: Lines) -> str:
    """The latest ``pem/top_entities``; empty if there are none."""
    found = next((line["pem/top_entities"] for line in reversed(lines) if "pem/top_entities" in line), "")
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


def _keys(lines: Lines, prefix: str = "", first: Sequence[str] = ()) -> list[str]:
    """Names of the numbers in any of the lines, those of `first` before the others."""
    found = dict.fromkeys(
        key for line in lines for key, value in line.items() if key.startswith(prefix) and _is_number(value)
    )
    return [*(key for key in first if key in found), *(key for key in found if key not in first)]


def _curve(lines: Lines, key: str, name: str, description: str = "", **changes: Any) -> LossCurve:
    points = [(int(line["step"]), float(line[key])) for line in lines if _is_number(line.get(key))]
    return LossCurve(
        name=name,
        description=description,
        steps=tuple(step for step, _ in points),
        values=tuple(value for _, value in points),
        **{"stage": "", **changes},
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def num_parameters(weights: Path) -> int:
    """Parameters in a safetensors file.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def shown_time(seconds: float | None = None) -> str:
    """A time, by default now, as a page shows it."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.strftime("%d %B %Y, %H:%M UTC")


def write_page(path: Path, html: str) -> None:
    """Writes a page aside and renames it: whoever looks at the old one never sees half of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(html, encoding="utf-8")
    aside.rename(path)
