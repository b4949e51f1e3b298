"""The step of `step.py` under torch.compile, prompter included; and over a literal transcription of the method.

To compile it takes minutes. Without a GPU nothing is compiled, as that takes longer on a CPU and says nothing of a GPU.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial

import torch

from benchmarks.gpu_pieces.piece import Parts, Setting
from benchmarks.gpu_pieces.step import Build, Case, build, measured
from benchmarks.harness import Row, Target, measure, quotients
from benchmarks.step import Step


def parts(setting: Setting) -> Parts:
    # Of the ratio: MFU, as the design has it.
    case = Case(batch=64, compile=True, target=Target(at_least=0.5, of="ratio"))
    if setting.is_quick:
        case = Case(batch=2, precision=setting.precision, compile=True)
    built = cache(partial(build, setting, case))  # Once: compiling takes most of the time.
    works = {case.name: measured, f"{case.name}, over separate passes": over_literal}
    return {name: partial(_with_compiler, work, setting, case, built) for name, work in works.items()}


def _with_compiler(
    work: Callable[[Setting, Case, Build], Sequence[Row]], setting: Setting, case: Case, build: Build
) -> Sequence[Row]:
    with nullcontext() if setting.is_cuda else torch.compiler.set_stance("force_eager"):
        return work(setting, case, build)


def _rate(step: Step, run: Callable[[], None]) -> float:
    return step.sample(run)["rate"]


def over_literal(setting: Setting, case: Case, build: Build) -> Sequence[Row]:
    """Compiled steps in turn with steps of separate passes, in one process."""
    step = build()
    variants = {"ours": step.ours, "literal": step.literal}
    rates = measure(
        {name: partial(_rate, step, run) for name, run in variants.items()},
        setting.repetitions(5),
    )
    times = quotients(rates["ours"], rates["literal"])
    target = None if setting.is_quick else Target(at_least=3.0)
    details = {"clips/s": rates["ours"].median, "separate passes clips/s": rates["literal"].median}
    return [Row.of(f"{case.name}, over separate passes", times, "x", target=target, details=details)]
