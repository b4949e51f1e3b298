"""How far off `alpro forecast` is on this machine: parts measured one by one, steps of real trainings beside them.

For each number of ranks the parts are measured with as many processes at work: matrix products by their width, all
other operations and the start of one (told apart by the passes of two models), what DeepSpeed does with a parameter,
sums over the ranks, a JPEG, and what a step of one small training takes beside all that. From these the steps of other
trainings are forecast, which have other widths, depths, frames, pictures and batches; none of their times is used. Each
is then trained for some steps by `alpro_stream.run.train`, with loader, prompter process and ranks at work.

`value` is the forecast, `limit` the median of the steps that were made, so the ratio is forecast over measured. `by
products alone` is what a forecast would say that knows only the rate of a large matrix product.

The rows `part, ...` are what `alpro forecast --gpu here --measured FILE` reads.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from alpro_launch.forecast.collectives import Links
from alpro_launch.forecast.facts import Facts, read_facts
from alpro_launch.forecast.machine import measured_machine
from alpro_launch.forecast.measured import Measured
from alpro_launch.forecast.parts import FRAME_SIZE, Parts, rows_of
from alpro_launch.forecast.rates import fitted_rates, not_negative
from alpro_launch.forecast.step import StepForecast, forecast_step, layout_of
from alpro_launch.forecast.work import RunWork, work_of
from alpro_launch.preflight_checks.links import bus_bandwidth
from alpro_stream.errors import ConfigError
from alpro_stream.losses.objective import DualObjective, Gather, GlobalFeatures, Terms, same_pairs
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.run import RunConfig, train
from alpro_stream.stream.batch import Batch
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.testing.shards import picture, write_dataset, write_tokenizer
from alpro_stream.train.distributed import World, join_world
from alpro_stream.train.engine import Engine
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.rehearsal import made_up_batch
from alpro_stream.train.step import Step
from benchmarks.harness import Measurement, Row, Target, main
from benchmarks.machine import describe
from benchmarks.timing import loopback_rate, repeat

_TOKENS = 24
_WARMUP_STEPS = 5
_TIMEOUT_S = 900.0
_SUMMED = 4 << 20
"""Numbers of fp32 in a sum over the ranks, about a bucket of gradients."""


@dataclass(frozen=True)
class Size:
    """A training that is measured; sides in pixels.

    Attributes:
        task: with or without multimodal encoder and prompter.
        width: of all encoders.
        depth: blocks of the video encoder; the text encoders have two layers each.
        num_frames: of a clip.
        image_size: side of a frame.
        patch_size: side of a patch.
        batch: over all ranks.
    """

    task: str
    width: int
    depth: int = 3
    num_frames: int = 4
    image_size: int = 96
    patch_size: int = 16
    batch: int = 12

    @property
    def name(self) -> str:
        """What tells it from the others."""
        shape = f"{self.num_frames} frames of {self.image_size}, batch {self.batch}"
        return f"{self.task}, width {self.width}, {self.depth} blocks, {shape}"

    def for_ranks(self, num_ranks: int) -> "Size":
        """With two samples or more for each rank, and as many on all."""
        least = 2 * num_ranks
        return replace(self, batch=-(-self.batch // least) * least)


# The parts are told apart by these two: one that mostly starts operations, one that mostly computes.
_FITTED = (Size("prompter", 64, depth=2, batch=4), Size("prompter", 192))
_CHECKED = (
    Size("pretrain", 128),  # the demo's
    Size("pretrain", 64, image_size=32, patch_size=8, batch=32),  # the ablations'
    Size("pretrain", 256, depth=4),
    Size("prompter", 128, depth=6, num_frames=8),
    Size("prompter", 256, depth=2, batch=24),
)
_QUICK_FITTED = (Size("prompter", 32, depth=1, batch=4), Size("prompter", 64, depth=1, batch=4))
_QUICK_CHECKED = (Size("prompter", 48, depth=2, batch=8), Size("pretrain", 32, depth=1, batch=4))


@dataclass(frozen=True)
class Passes:
    """What one of the fitted sizes took, in seconds; of the slowest rank."""

    forward_s: float
    backward_s: float
    engine_s: float


@dataclass(frozen=True)
class Taken:
    """What the ranks measured.

    Attributes:
        products: operations a second, by width.
        frame_s: of a core, for a stored frame.
        links: None of one rank.
        loopback_per_s: bytes a second that one connection carries, with the other ranks at rest; 0 of one rank.
        passes: of the fitted sizes.
        steps: seconds of each step of the trainings, by size; the first fitted one, and those that are checked.
    """

    products: dict[int, float]
    frame_s: float
    links: Links | None
    loopback_per_s: float
    passes: list[Passes]
    steps: dict[str, list[float]]


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measures parts and trainings with each number of ranks, and forecasts these from those."""
    num_cores = int(describe()["num_cores"])
    found: list[Row] = []
    errors: list[float] = []
    for num_ranks in arguments.ranks:
        if not 1 <= num_ranks <= max(1, num_cores):
            raise ConfigError(f"--ranks {num_ranks}: at least 1, and not more than the {num_cores} cores that are here")
        with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
            more, off = _rows(arguments, Path(folder), num_ranks, num_cores)
        found += more
        errors += off
    target = None if arguments.quick else Target(at_most=15)
    found.append(Row(name="error, median", value=100 * statistics.median(errors), unit="%", target=target))
    found.append(Row(name="error, largest", value=100 * max(errors), unit="%"))
    return found


def _rows(arguments: argparse.Namespace, folder: Path, num_ranks: int, num_cores: int) -> tuple[list[Row], list[float]]:
    """Rows of one number of ranks, and how far off each of its forecasts is."""
    sizes = (_QUICK_FITTED, _QUICK_CHECKED) if arguments.quick else (_FITTED, _CHECKED)
    fitted, checked = (tuple(size.for_ranks(num_ranks) for size in group) for group in sizes)
    corpus = _write_corpus(folder / "corpus", max(size.batch for size in (*fitted, *checked)))
    num_steps = _WARMUP_STEPS + (5 if arguments.quick else 40)
    runs = {size: _Run(corpus, folder, size, num_ranks, num_cores, num_steps) for size in (*fitted, *checked)}
    taken = run_ranks(_measure, num_ranks, runs, fitted, arguments.quick, timeout_s=_TIMEOUT_S)[0]
    parts = _parts(taken, [runs[size] for size in fitted], num_ranks)
    found = [Row(name=name, value=value, unit=unit) for name, value, unit in rows_of(parts, num_ranks)]
    if taken.links:
        found.append(
            Row(
                name=f"{_ranks(num_ranks)}: sums, bus bandwidth",
                value=taken.links.inside_per_s / 1e9,
                unit="GB/s",
                limit=taken.loopback_per_s / 1e9,
                limit_of="one connection of the loopback",
            )
        )
    errors = []
    for size in checked:
        run = runs[size]
        steps = Measurement(tuple(1e3 * step for step in taken.steps[size.name][_WARMUP_STEPS:]))
        said = run.forecast(parts)
        bare_s = said.flops / max(taken.products.values())
        errors.append(abs(1e3 * said.step_s / steps.median - 1))
        found.append(
            Row(
                name=f"{_ranks(num_ranks)}: {size.name}",
                value=1e3 * said.step_s,
                unit="ms",
                spread=steps.spread,
                limit=steps.median,
                limit_of="the steps of a real training",
                details={"error %": 100 * errors[-1], "by products alone": 1e3 * bare_s / steps.median},
            )
        )
    return found, errors


class _Run:
    """A training of one size, and what a forecast knows of it."""

    def __init__(self, corpus: Path, folder: Path, size: Size, num_ranks: int, num_cores: int, num_steps: int) -> None:
        self.size, self.num_ranks, self._num_cores = size, num_ranks, num_cores
        self.stage_one = folder / f"prompter-{size.image_size}-{size.patch_size}-{size.num_frames}-{size.width}"
        self.tree = _tree(corpus, folder / f"run-{size.name}", size, num_ranks, num_cores, num_steps)
        if size.task == "pretrain":
            self.tree["prompter"] = {"checkpoint": str(self.stage_one)}

    @property
    def config(self) -> RunConfig:
        """Of the training."""
        return RunConfig.model_validate(self.tree)

    def first_stage(self) -> RunConfig:
        """A prompter of the same size, trained for a step."""
        stage = {"task": "prompter", "run_dir": str(self.stage_one), "prompter": None}
        return RunConfig.model_validate({**self.tree, **stage, "train": {**self.tree["train"], "max_steps": 1}})

    def known(self) -> tuple[Facts, RunWork]:
        """Sizes, data and work."""
        config = self.config
        facts = read_facts(config)
        return facts, work_of(config, facts.sizes, facts.data.kinds)

    def forecast(self, parts: Parts) -> StepForecast:
        """A step of it, on a machine of these parts."""
        facts, work = self.known()
        measured = Measured(machine="here", num_cores=self._num_cores, parts={self.num_ranks: parts})
        machine = measured_machine(self.config, measured, self.num_ranks, facts.data)
        return forecast_step(self.config, facts, work, machine, layout_of(self.config, 1, self.num_ranks))


def _parts(taken: Taken, fitted: Sequence[_Run], num_ranks: int) -> Parts:
    """The parts behind what was measured."""
    known = [run.known() for run in fitted]
    samples, updates, sums = [], [], []
    for run, (_, work), passes in zip(fitted, known, taken.passes, strict=True):
        micro = work.of("video", run.size.batch / num_ranks)
        samples += [
            (micro.forward, run.size.width, passes.forward_s),
            (micro.backward, run.size.width, passes.backward_s),
        ]
        updates.append([work.trained / num_ranks, work.num_tensors])
    rates = fitted_rates(taken.products, samples)
    nothing = Parts(rates, 0.0, 0.0, taken.frame_s, 0.0, taken.links)
    for run, passes in zip(fitted, taken.passes, strict=True):
        step = run.forecast(nothing)
        exchange_s = step.parts["gradients between ranks"] + step.parts["features between ranks"]
        sums.append(max(0.0, passes.engine_s - passes.forward_s - passes.backward_s - exchange_s))
    update_s, tensor_s = not_negative(np.array(updates, dtype=float), np.array(sums))
    parts = replace(nothing, update_s=update_s, update_tensor_s=tensor_s)
    first = fitted[0]
    said = first.forecast(parts).step_s
    made = statistics.median(taken.steps[first.size.name][_WARMUP_STEPS:])
    return replace(parts, rest_s=max(0.0, made - said))


def _measure(runs: Mapping[Size, _Run], fitted: Sequence[Size], quick: bool) -> Taken:
    """On every rank: parts first, then the trainings."""
    world = join_world(_TIMEOUT_S, run="the forecast's parts")
    first = next(iter(runs.values())).config
    torch.set_num_threads(first.train.engine.num_threads or 1)
    products: dict[int, list[float]] = {width: [] for width in sorted({size.width for size in runs})}
    timers = [_PassTimer(runs[size], world) for size in fitted]

    def sample() -> None:
        for width, rates in products.items():
            rates.append(_product_rate(width, world, 5 if quick else 30))
        for timer in timers:
            timer.sample(3 if quick else 15)

    sample()
    links = _links(world) if world.size > 1 else None
    loopback_per_s = loopback_rate(_SUMMED * 4) if world.size > 1 and world.rank == 0 else 0.0
    world.barrier()
    steps = {}
    for size in (fitted[0], *(size for size in runs if size not in fitted)):
        run = runs[size]
        if size.task == "pretrain" and not run.stage_one.exists():
            train(run.first_stage())
        train(run.config)
        world.barrier()  # The first rank has written all lines.
        steps[size.name] = [line["step_s"] for line in read_metrics(run.config.run_dir)]
    sample()  # Again: the machine may have become slower or faster meanwhile.
    passes = [timer.medians() for timer in timers]
    rate_of = {width: statistics.median(rates) for width, rates in products.items()}
    return Taken(rate_of, _frame_s(), links, loopback_per_s, passes, steps)


def _product_rate(width: int, world: World, count: int) -> float:
    """Operations a second of a linear layer as the encoders have them, forward and backward, on the slowest rank."""
    rows_RD = torch.randn(2048, width, requires_grad=True)
    weight_FD = torch.randn(4 * width, width, requires_grad=True)

    def products() -> None:
        out_RF = linear(rows_RD, weight_FD)
        out_RF.backward(out_RF)  # type: ignore[no-untyped-call]

    return 3 * 2.0 * 2048 * width * 4 * width / _slowest(statistics.median(repeat(products, count)), world)


def _frame_s() -> float:
    jpeg = picture(0, 0, FRAME_SIZE)
    return statistics.median(repeat(lambda: simplejpeg.decode_jpeg(jpeg), 50))


def _links(world: World) -> Links:
    """Between the ranks of this machine, in the sizes of a step's sums."""
    numbers, one = torch.zeros(_SUMMED), torch.zeros(1)
    sums_s = _slowest(statistics.median(repeat(lambda: dist.all_reduce(numbers), 8)), world)
    start_s = _slowest(statistics.median(repeat(lambda: dist.all_reduce(one), 50)), world)
    per_s = 1e9 * bus_bandwidth(numbers.nbytes, sums_s, world.size)
    return Links(per_s, per_s, start_s)


class _PassTimer:
    """Takes samples of forward and backward of the dual encoder by themselves, and of a whole step of the engine."""

    def __init__(self, run: _Run, world: World) -> None:
        config, size = run.config, run.size
        torch.manual_seed(0)
        vocab_size = run.known()[0].sizes.vocab_size
        self._world = world
        self._objective = DualObjective(DualEncoder(config.model, vocab_size))
        samples, lanes = size.batch // world.size, config.stream.num_lanes // world.size
        frames = (size.num_frames, size.image_size)
        self._batch = made_up_batch("video", samples, lanes, frames, _TOKENS, vocab_size, world.rank)
        # Of a copy, as DeepSpeed acts on every backward pass of what it has.
        engine = Engine(copy.deepcopy(self._objective), config.train.engine, config.train.optimizer, world, samples)
        self._step = Step(engine, world, 1, seed=0)
        self._terms: list[Terms] = []
        self._samples: dict[str, list[float]] = {"forward": [], "backward": [], "engine": []}

    def sample(self, count: int) -> None:
        """Takes so many of each in turn, after one that does not count."""
        for number in range(count + 1):
            taken = {
                "forward": _seconds(self._forward),
                "backward": _seconds(self._backward),
                "engine": _seconds(lambda: self._step.train(self._batch, None, 1e-4)),
            }
            for name, seconds in taken.items():
                self._samples[name] += [seconds] if number else []

    def medians(self) -> Passes:
        """Of all samples, and of the slowest rank."""
        medians = {name: _slowest(statistics.median(taken), self._world) for name, taken in self._samples.items()}
        return Passes(medians["forward"], medians["backward"], medians["engine"])

    def _forward(self) -> None:
        self._terms[:] = [self._objective(self._batch, _own_features(self._batch), 1)]

    def _backward(self) -> None:
        self._terms.pop().total.backward()  # type: ignore[no-untyped-call]
        self._objective.zero_grad()


def _own_features(batch: Batch) -> Gather:
    ignore = same_pairs(batch.video_id_B, batch.text_id_B)
    return lambda video_BE, text_BE: GlobalFeatures(video_BE, text_BE, ignore, batch.valid_B, 0)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _slowest(seconds: float, world: World) -> float:
    """The longest time of all ranks, on each of them."""
    return float(world.gather(torch.tensor([seconds], dtype=torch.float64)).max())


def _write_corpus(folder: Path, batch: int) -> Path:
    """Clips enough for some batches, and a tokenizer."""
    write_dataset(folder / "train", video_shards=(batch, batch, batch), num_frames=12, size=FRAME_SIZE)
    write_tokenizer(folder / "tokenizer")
    return folder


def _tree(corpus: Path, run_dir: Path, size: Size, num_ranks: int, num_cores: int, num_steps: int) -> dict[str, Any]:
    """The configuration of a training, as plain values."""
    heads = 4
    text = {"width": size.width, "num_layers": 2, "num_multimodal_layers": 2, "num_heads": heads}
    video = {name: getattr(size, name) for name in ("image_size", "patch_size", "num_frames", "width", "depth")}
    return {
        "task": size.task,
        "run_dir": str(run_dir),
        "stream": {
            "sources": [{"path": str(corpus / "train")}],
            "global_batch": size.batch,
            "num_lanes": num_ranks,
            "text": {"tokenizer": str(corpus / "tokenizer"), "num_tokens": _TOKENS},
            "decode": {"num_workers": 1},
        },
        "model": {
            "video": {**video, "num_heads": heads},
            "text": {**text, "intermediate_size": 2 * size.width, "max_positions": 64},
            "projection_size": 64,
        },
        "train": {
            "max_steps": num_steps,
            "checkpoint_every": 10**6,
            "rehearsal": False,
            "engine": {"num_threads": max(1, num_cores // num_ranks)},
        },
    }


def _ranks(num_ranks: int) -> str:
    return f"{num_ranks} rank{'' if num_ranks == 1 else 's'}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    most = min(2, len(os.sched_getaffinity(0)))
    default = list(range(1, most + 1))
    parser.add_argument("--ranks", type=int, nargs="+", default=default, metavar="N", help="numbers of processes")


if __name__ == "__main__":
    main("forecast", rows, add_arguments=_arguments)
