"""The prompter in its process beside a trainer, its batches handed over by CUDA IPC (`benchmarks/prompter.py`)."""

import argparse
from collections.abc import Sequence
from functools import partial

from benchmarks.gpu_pieces.piece import Parts, Setting, peak_gib
from benchmarks.harness import Measurement, Row, Target, measure, quotients
from benchmarks.prompter import Bench


def parts(setting: Setting) -> Parts:
    return {"prompter": partial(measured, setting)}


def measured(setting: Setting) -> Sequence[Row]:
    """Steps without labels, with labels inline and with the process, in turn."""
    size = 4 if setting.is_quick else 32
    model = "small" if setting.is_quick else "base"
    with Bench(argparse.Namespace(model=model, batch=size, precision=setting.precision, compile=False)) as bench:
        variants = {"without labels": bench.without_labels, "inline": bench.inline, "process": bench.process}
        steps = measure(variants, setting.repetitions(7))
        # Behind the first round, which is warm-up.
        labels, inline, waits = (
            Measurement(tuple(each[1:])) for each in (bench.labels, bench.inline_labels, bench.waits)
        )
    alone = size / steps["without labels"].median
    promised = setting.is_cuda and not setting.is_quick
    shares = quotients(waits, steps["process"])
    over = quotients(steps["process"], steps["inline"])
    rates = {name: Measurement(tuple(size / each for each in seconds.samples)) for name, seconds in steps.items()}
    per_s = {
        "labels, by the process beside the step": Measurement(tuple(size / each for each in labels.samples)),
        "labels, inline": Measurement(tuple(size / each for each in inline.samples)),
    }
    # This process has a labeller of its own; that of the prompter's process is not counted.
    peak = {f"trainer with inline labeller, {name}": gib for name, gib in peak_gib(setting.device).items()}
    return [
        *(
            Row.of(f"step, labels: {name}", rate, "clips/s", alone, limit_of="without labels")
            for name, rate in rates.items()
        ),
        *(Row.of(name, rate, "labels/s") for name, rate in per_s.items()),
        Row.of(
            "process over inline",
            over,
            "x",
            target=Target(at_most=1.05) if promised else None,
            details=peak,
        ),
        Row.of("wait for labels", shares, "of the step", target=Target(at_most=0.01) if promised else None),
    ]
