"""What a pre-training step of the base model costs: forward, backward and the prompter, without optimizer and data.

`literal` is the method as separate passes (`benchmarks/literal.py`). Each of the two lives in a process of its own, as
it would for a user (only ours keeps freed memory, as `alpro train` does), and they take turns; each sample of a rate is
taken between two of a plain matrix product. The `operations` are those of the method (`alpro_stream.model.operations`),
whatever an implementation saves of them. The parts are seconds of one step that is not compiled, with limits from the
matrix product; on a GPU every part waits for the device, so they add up to more than the step.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from alpro_stream.errors import ConfigError
from alpro_stream.losses.objective import (
    GlobalCounts,
    GlobalFeatures,
    ObjectiveConfig,
    PretrainObjective,
    SoftLabels,
    count_local,
    same_pairs,
)
from alpro_stream.losses.pem import PemConfig
from alpro_stream.model.alpro import AlproModel, DualEncoder, Heads, ModelConfig
from alpro_stream.model.checkpointing import set_checkpointing
from alpro_stream.model.cpu_memory import keep_freed_memory
from alpro_stream.model.operations import Operations, count_parameters, peak_per_s, pretraining_operations
from alpro_stream.model.text_encoder import MultimodalEncoder, TextEncoder, TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoder, VideoEncoderConfig
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.maker import negative_noise
from benchmarks import literal
from benchmarks.harness import Measurement, Row, Target, main, measure, quotients
from benchmarks.timing import Stopwatch, matrix_product_rate, wait_for_device

NUM_TOKENS, VOCAB_SIZE, NUM_ENTITIES = 30, 30522, 1000
SMALL = ModelConfig(
    video=VideoEncoderConfig(image_size=64, width=64, depth=2, num_heads=2),
    text=TextEncoderConfig(width=64, num_layers=1, num_multimodal_layers=2, num_heads=2, intermediate_size=128),
    projection_size=32,
)


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measures the two in turn, then one step of ours by parts."""
    if arguments.batch < 2:
        raise ConfigError(f"--batch {arguments.batch}: VTM needs a negative, so at least 2")
    with Worker("step", arguments) as step, Worker("literal", arguments) as literally:
        samples: dict[str, list[dict[str, float]]] = {"step": [], "literal": []}

        def sample(worker: Worker) -> float:
            answer = worker.ask("sample")
            samples[worker.name].append(answer)
            return float(answer["rate"])

        workers = {worker.name: functools.partial(sample, worker) for worker in (step, literally)}
        rates = measure(workers, 2 if arguments.quick else 5)
        facts = step.ask("facts")
    counted = {name: taken[-len(rates[name].samples) :] for name, taken in samples.items()}  # Without the warm-up.
    ratios = {name: Measurement(tuple(taken["ratio"] for taken in counted[name])) for name in counted}
    gflops = {name: _scaled(rates[name], facts["operations"] / 1e9) for name in rates}
    times = quotients(rates["step"], rates["literal"])
    # What the same number of operations takes at the rate of the matrix products around them.
    peaks = {name: rates[name].median / ratios[name].median for name in rates}
    over_literal, over_product, mfu = _goals(facts["device"], arguments)
    size, product = arguments.batch, "matrix product"
    return [
        Row.of("samples", rates["step"], "samples/s", peaks["step"], limit_of=product),
        Row.of("samples, literal", rates["literal"], "samples/s", peaks["literal"], limit_of=product),
        Row.of("step over literal", times, "x", target=over_literal),
        Row.of("operations over matrix product", ratios["step"], "x", target=over_product),
        Row.of("operations over matrix product, literal", ratios["literal"], "x"),
        *(
            Row.of(title, gflops[name], "GFLOP/s", peaks[name] * facts["operations"] / 1e9, limit_of=product)
            for title, name in (("operations", "step"), ("operations, literal", "literal"))
        ),
        *(
            [Row.of("MFU", _scaled(gflops["step"], 1e9 / facts["peak"]), "x", target=mfu)]
            if facts["peak"] and arguments.precision == "bf16"
            else []
        ),
        *(
            Row(
                name=f"part: {name}",
                value=seconds,
                unit="s",
                limit=size * operations / facts["product"],
                limit_of=product,
            )
            for name, (seconds, operations) in facts["parts"].items()
        ),
        *(Row(name=name, value=gib, unit="GiB") for name, gib in facts["memory"].items()),
        Row(name="operations of a sample", value=facts["operations"] / 1e9, unit="GFLOP"),
        Row(name="parameters", value=facts["parameters"] / 1e6, unit="M"),
    ]


class Worker:
    """A process that computes one of the two when it is asked, and waits meanwhile."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        options = ["--batch", str(arguments.batch), "--precision", arguments.precision]
        options += ["--compile" if arguments.compile else "--no-compile"] + ["--small"] * arguments.small
        command = [sys.executable, "-m", "benchmarks.step", *options, "--worker", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        """The answer of the process.

        Raises:
            ConfigError: it ended; its own message is on the screen.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(what, file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise ConfigError(f"the process of {self.name} ended with status {self._process.wait()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def serve(arguments: argparse.Namespace) -> None:
    """The other side of `Worker`: one line in, one line out, until nobody asks any more."""
    step = Step(arguments)
    run = step.ours if arguments.worker == "step" else step.literal
    if arguments.worker == "step" and step.device.type == "cpu":
        keep_freed_memory()  # As `alpro train` does.
    for line in sys.stdin:
        answer = step.sample(run) if line.strip() == "sample" else step.facts()
        print(json.dumps(answer), flush=True)


@dataclass(frozen=True)
class Inputs:
    """A batch with its labels' bank."""

    batch: Batch
    bank_ME: torch.Tensor


class Step:
    """The base model, a prompter of the same size, and one batch."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        self._is_compiled = arguments.compile
        self.config = SMALL if arguments.small else ModelConfig()
        torch.manual_seed(0)
        heads = Heads.of("pretrain", NUM_ENTITIES)
        self.model = AlproModel(self.config, VOCAB_SIZE, heads).to(self.device)
        self.objective = PretrainObjective(self.model, ObjectiveConfig())
        if arguments.compile:
            self.objective.compile_parts()
        self.prompter = DualEncoder(self.config, VOCAB_SIZE).to(self.device)
        self.inputs = _inputs(self.config, arguments.batch, self.device)
        banks = {"video": self.inputs.bank_ME, "image": self.inputs.bank_ME}
        patch_size = self.config.video.patch_size
        self.labeller = Labeller(self.prompter, banks, PemConfig(), patch_size, compile=arguments.compile)
        self.operations: Operations = pretraining_operations(self.config, NUM_TOKENS, VOCAB_SIZE, heads)
        self._product_size = 8192 if self.device.type == "cuda" else (256 if arguments.small else 2048)

    def ours(self) -> None:
        """One step as `alpro train` computes it."""
        with self._autocast():
            self._forward_backward(self._labels())

    def literal(self) -> None:
        """One step of the method as separate passes."""
        with self._autocast():
            labels = literal.soft_labels(self.prompter, self.inputs.bank_ME, self.inputs.batch)
            values = literal.losses(self.model, self.inputs.batch, *labels)
        torch.stack(list(values.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad()

    def sample(self, run: Callable[[], None]) -> dict[str, float]:
        """Samples a second of a step, and the ratio of its operations to the matrix product around it."""
        before = self.product_rate()
        wait_for_device()
        started = time.perf_counter()
        run()
        wait_for_device()
        rate = len(self.inputs.batch) / (time.perf_counter() - started)
        product = (before + self.product_rate()) / 2
        return {"rate": rate, "ratio": rate * self.operations.step / product}

    def facts(self) -> dict[str, Any]:
        """What does not need the other process: parts, memory, counts."""
        return {
            "device": self.device.type,
            "peak": peak_per_s(torch.cuda.get_device_name()) if self.device.type == "cuda" else None,
            "operations": self.operations.step,
            "parameters": count_parameters(self.model)["total"],
            "product": self.product_rate(),
            "parts": self.parts(),
            "memory": self.memory(),
        }

    def product_rate(self) -> float:
        """Operations a second of a plain matrix product in the step's number format, for about a second."""
        return matrix_product_rate(self._product_size, self.dtype, self.device, count=6)

    def parts(self) -> dict[str, tuple[float, float]]:
        """Seconds of the parts of one step, and their operations for one sample."""
        eager = torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()
        with eager, Stopwatch() as watch, self._autocast():
            watch.on(Labeller, "__call__", "prompter")
            labels = self._labels()
            # After the prompter, which has a video encoder too.
            watch.on(VideoEncoder, "forward", "video encoder")
            watch.on(TextEncoder, "forward", "text encoder")
            watch.on(MultimodalEncoder, "begin", "fusion")
            watch.on(MultimodalEncoder, "finish", "fusion")
            watch.on(PretrainObjective, "forward", "forward")
            watch.on(Step, "_backward", "backward")
            self._forward_backward(labels)
        seconds = {name: sum(values) for name, values in watch.seconds.items()}
        counted = self.operations
        encoders = {"video encoder": counted.video, "text encoder": counted.text, "fusion": counted.fusion}
        seconds["losses"] = seconds["forward"] - sum(seconds[name] for name in encoders)
        operations = encoders | {
            "losses": counted.heads,
            "backward": counted.backward,
            "prompter": counted.prompter,
        }
        return {name: (seconds[name], count) for name, count in operations.items()}

    def memory(self) -> dict[str, float]:
        """Peak of a step in GiB: on a GPU without and with activation checkpointing, on a CPU of the process."""
        if self.device.type != "cuda":
            return {"peak memory of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        found = {}
        for name, enabled in (("peak memory", False), ("peak memory, activation checkpointing", True)):
            set_checkpointing(self.model, enabled)
            torch.cuda.reset_peak_memory_stats()
            self.ours()
            found[name] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _labels(self) -> SoftLabels:
        batch = self.inputs.batch
        return self.labeller(batch.frames_BTHWC, batch.boxes_B4, "video")

    def _forward_backward(self, labels: SoftLabels) -> None:
        batch = self.inputs.batch
        ignore_GG = same_pairs(batch.video_id_B, batch.text_id_B)
        counts = GlobalCounts(*count_local(batch, labels))
        terms = self.objective(batch, lambda v, t: GlobalFeatures(v, t, ignore_GG, batch.valid_B, 0), 1, counts, labels)
        self._backward(terms.total)

    def _backward(self, total: torch.Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            total.backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad()


def _goals(device: str, arguments: argparse.Namespace) -> tuple[Target | None, Target | None, Target | None]:
    """What is promised for the base model: over the literal step, over the matrix product, MFU."""
    if arguments.small:
        return None, None, None
    if device == "cuda":
        if arguments.precision != "bf16" or not arguments.compile:
            return None, None, None
        return Target(at_least=3.0), None, Target(at_least=0.5)
    if arguments.precision == "bf16":
        # Only where the processor multiplies in bf16; elsewhere it is converted back and forth.
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return (Target(at_least=1.8) if {"avx512_bf16", "amx_bf16"} & set(flags.split()) else None), None, None
    return Target(at_least=1.15), Target(at_least=0.85), None


def _scaled(rates: Measurement, factor: float) -> Measurement:
    return Measurement(tuple(rate * factor for rate in rates.samples))


def _inputs(config: ModelConfig, size: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    video = config.video
    shape = (size, video.num_frames, video.image_size, video.image_size, 3)
    ids_BL = torch.randint(1000, VOCAB_SIZE, (size, NUM_TOKENS), generator=generator)
    chosen_BL = torch.rand(size, NUM_TOKENS, generator=generator) < 0.15
    chosen_BL[:, 1] = True
    side = max(1, video.grid // 2)
    batch = Batch(
        step=0,
        source="random",
        kind="video",
        first_lane=0,
        num_lanes=1,
        keys=tuple(map(str, range(size))),
        captions=tuple(map(str, range(size))),
        frames_BTHWC=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        ids_BL=ids_BL,
        mask_BL=torch.ones_like(ids_BL),
        mlm_ids_BL=ids_BL.masked_fill(chosen_BL, 103),
        mlm_labels_BL=ids_BL.masked_fill(~chosen_BL, -100),
        boxes_B4=torch.tensor([[1 % video.grid, 0, side, side]] * size),
        video_id_B=torch.arange(size),
        text_id_B=torch.arange(size),
        noise_B2N=negative_noise(0, 0, range(1), size),
        valid_B=torch.ones(size, dtype=torch.bool),
        answers=("",) * size,
        num_quarantined=0,
    )
    bank_ME = torch.nn.functional.normalize(
        torch.randn(NUM_ENTITIES, config.projection_size, generator=generator), dim=1
    )
    return Inputs(batch.to(device), bank_ME.to(device))


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"batch": arguments.batch, "precision": arguments.precision, "compiled": arguments.compile}


def _arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    # On a GPU those of the promise.
    batch, precision = (64, "bf16") if on_gpu else (4, "fp32")
    parser.add_argument("--batch", type=int, default=batch, help=f"samples of a step (here {batch})")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default=precision, help=f"bf16 is autocast (here {precision})"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="torch.compile (on a GPU)"
    )
    parser.add_argument("--worker", choices=("step", "literal"), help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="a model of toy size: to see that it runs")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        mine = argparse.ArgumentParser()
        _arguments(mine)
        serve(mine.parse_args())
    else:
        main("step", rows, add_arguments=_arguments, describe_content=_describe)
