"""A pre-training step of the published model with its prompter, without optimizer and data (`benchmarks/step.py`).

The ratio of a row is MFU against the matrix product that PyTorch reached around each sample; against the data sheet it
is in the details.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from alpro_stream.model.checkpointing import set_checkpointing
from alpro_stream.model.operations import peak_per_s
from benchmarks.gpu_pieces.piece import Parts, Setting, peak_gib
from benchmarks.harness import Measurement, Row, Target
from benchmarks.step import Step
from benchmarks.timing import wait_for_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How a step is computed.

    Attributes:
        batch: samples.
        precision: of the products.
        compile: by torch.compile.
        checkpointing: of activations.
        target: what is promised for it.
    """

    batch: int
    precision: str = "bf16"
    compile: bool = False
    checkpointing: bool = False
    target: Target | None = None

    @property
    def name(self) -> str:
        """What tells it from the others."""
        how = [self.precision, f"batch {self.batch}"]
        how += ["compiled"] * self.compile + ["activation checkpointing"] * self.checkpointing
        return ", ".join(["step", *how])


# 16 is what each of 16 GPUs has in the published run.
CASES = (
    Case(batch=16),
    Case(batch=64),
    Case(batch=128),
    Case(batch=64, checkpointing=True),
    Case(batch=16, precision="fp32"),
)
QUICK_CASES = (Case(batch=2), Case(batch=2, checkpointing=True))


def parts(setting: Setting) -> Parts:
    cases = [replace(case, precision=setting.precision) for case in QUICK_CASES] if setting.is_quick else CASES
    return {case.name: partial(measured, setting, case, partial(build, setting, case)) for case in cases}


Build = Callable[[], Step]
"""Builds the step of a case."""


def measured(setting: Setting, case: Case, build: Build) -> Sequence[Row]:
    """Samples of a step, after two that do not count."""
    step = build()
    started = time.perf_counter()
    run(step)
    first_s = time.perf_counter() - started
    return [row(setting, case, step, {"first step s": first_s} if case.compile else {})]


def build(setting: Setting, case: Case) -> Step:
    """The model and its batch."""
    options = {"batch": case.batch, "precision": case.precision, "compile": case.compile, "small": setting.is_quick}
    step = Step(argparse.Namespace(**options))
    set_checkpointing(step.model, case.checkpointing)
    return step


def run(step: Step) -> None:
    """One step, to its end."""
    step.ours()
    wait_for_device()


def row(setting: Setting, case: Case, step: Step, details: dict[str, float]) -> Row:
    """Samples of a step that ran once."""
    run(step)
    samples = [step.sample(step.ours) for _ in range(setting.repetitions(7))]
    operations = step.operations.step / 1e12
    rates = Measurement(tuple(sample["rate"] * operations for sample in samples))
    products = Measurement(tuple(sample["rate"] * operations / sample["ratio"] for sample in samples))
    details = {"clips/s": rates.median / operations, **peak_gib(setting.device), **details}
    peak = peak_per_s(torch.cuda.get_device_name(setting.device)) if setting.is_cuda else None
    if peak and case.precision == "bf16":
        details["MFU, data sheet"] = 1e12 * rates.median / peak
    return Row.of(case.name, rates, "TFLOP/s", products, case.target, details, "matrix product")
