"""What a pre-training step of the base model costs: forward, backward and the prompter, without optimizer and data.

Each sample of a rate is taken between two of a plain matrix product. `operations` counts those of the method
(`alpro_stream.model.operations`) and says how many of them a second that is. `literal` is the method as separate passes
(`benchmarks/literal.py`), interleaved with ours; so is the step with four times the inputs for images of one frame.
The parts are seconds of one step with limits from the matrix product; on a GPU every part waits for the device, so they
add up to more than the step.
"""

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

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
from alpro_stream.model.operations import Operations, pretraining_operations
from alpro_stream.model.text_encoder import MultimodalEncoder, TextEncoder, TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoder, VideoEncoderConfig
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.maker import negative_noise
from benchmarks import literal
from benchmarks.harness import Measurement, Row, Target, main, measure
from benchmarks.timing import Stopwatch, matrix_product_rate, wait_for_device

NUM_TOKENS, VOCAB_SIZE, NUM_ENTITIES = 30, 30522, 1000
SMALL = ModelConfig(
    video=VideoEncoderConfig(image_size=64, width=64, depth=2, num_heads=2),
    text=TextEncoderConfig(width=64, num_layers=1, num_multimodal_layers=2, num_heads=2, intermediate_size=128),
    projection_size=32,
)


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measures the steps in turn, then one step by parts."""
    step = Step(arguments)
    steps = {"step": step.ours, "literal": step.literal}
    rates = measure({name: step.rated(run) for name, run in steps.items()}, 2 if arguments.quick else 5)
    ratios = {name: Measurement(tuple(step.ratios[name][-len(rate.samples) :])) for name, rate in rates.items()}
    per_sample = step.operations.step
    flops = [Measurement(tuple(rate * per_sample / 1e9 for rate in rates[name].samples)) for name in steps]
    on_gpu = step.device.type == "cuda"
    goal = Target(at_least=(0.5 if on_gpu else 0.85))
    times = Measurement(tuple(o / t for o, t in zip(rates["step"].samples, rates["literal"].samples, strict=True)))
    is_base = step.config == ModelConfig()
    shown = [
        Row.of("samples", rates["step"], "samples/s"),
        Row.of("samples, literal", rates["literal"], "samples/s"),
        Row.of("step over literal", times, "x", target=_goal(step) if is_base else None),
        Row.of("operations", flops[0], "GFLOP/s", limit=flops[0].median / ratios["step"].median),
        Row.of("operations over matrix product", ratios["step"], "x", target=goal if is_base else None),
        Row.of("operations, literal", flops[1], "GFLOP/s", limit=flops[1].median / ratios["literal"].median),
        *step.parts(),
        Row(name="operations of a sample", value=per_sample / 1e9, unit="GFLOP"),
        Row(name="parameters", value=step.num_parameters / 1e6, unit="M"),
        *step.memory(),
    ]
    return shown


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
        self.config = SMALL if arguments.small else ModelConfig()
        if arguments.batch < 2:
            raise ConfigError(f"--batch {arguments.batch}: VTM needs a negative, so at least 2")
        torch.manual_seed(0)
        heads = Heads.of("pretrain", NUM_ENTITIES)
        self.model = AlproModel(self.config, VOCAB_SIZE, heads).to(self.device)
        self.objective = PretrainObjective(self.model, ObjectiveConfig())
        if arguments.compile:
            self.objective.compile_parts()
        self.prompter = DualEncoder(self.config, VOCAB_SIZE).to(self.device)
        self.inputs = _inputs(self.config, arguments.batch, self.device)
        banks = {"video": self.inputs.bank_ME, "image": self.inputs.bank_ME}
        self.labeller = Labeller(self.prompter, banks, PemConfig(), self.config.video.patch_size)
        self.operations: Operations = pretraining_operations(self.config, NUM_TOKENS, VOCAB_SIZE, heads)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.ratios: dict[str, list[float]] = {"step": [], "literal": []}
        self._product_size = 8192 if self.device.type == "cuda" else (256 if arguments.small else 2048)

    def ours(self) -> str:
        """One step as `alpro train` computes it."""
        batch = self.inputs.batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            self._forward_backward(self.labeller(batch.frames_BTHWC, batch.boxes_B4, "video"))
        return "step"

    def literal(self) -> str:
        """One step of the method as separate passes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            labels = literal.soft_labels(self.prompter, self.inputs.bank_ME, self.inputs.batch)
            values = literal.losses(self.model, self.inputs.batch, *labels)
        torch.stack(list(values.values())).sum().backward()
        self.model.zero_grad()
        return "literal"

    def rated(self, run: Callable[[], str]) -> Callable[[], float]:
        """Samples a second of a step; notes the ratio of its operations to the matrix product around it."""

        def sample() -> float:
            before = self.product_rate()
            wait_for_device()
            started = time.perf_counter()
            name = run()
            wait_for_device()
            rate = len(self.inputs.batch) / (time.perf_counter() - started)
            product = (before + self.product_rate()) / 2
            self.ratios[name].append(rate * self.operations.step / product)
            return rate

        return sample

    def product_rate(self) -> float:
        """Operations a second of a plain matrix product in the step's number format, for about a second."""
        return matrix_product_rate(self._product_size, self.dtype, self.device, count=6)

    def parts(self) -> list[Row]:
        """Seconds of the parts of one step, after one that does not count."""
        self.ours()
        product = self.product_rate()
        with Stopwatch() as watch:
            watch.on(VideoEncoder, "forward", "video encoder")
            watch.on(TextEncoder, "forward", "text encoder")
            watch.on(MultimodalEncoder, "begin", "fusion")
            watch.on(MultimodalEncoder, "finish", "fusion")
            watch.on(Labeller, "__call__", "prompter")
            watch.on(PretrainObjective, "forward", "forward")
            watch.on(Step, "_backward", "backward")
            self.ours()
        seconds = {name: sum(values) for name, values in watch.seconds.items()}
        inside = sum(seconds[name] for name in ("video encoder", "text encoder", "fusion"))
        seconds["losses"] = seconds.pop("forward") - inside
        size, counted = len(self.inputs.batch), self.operations
        limits = {
            "video encoder": counted.video,
            "text encoder": counted.text,
            "fusion": counted.fusion,
            "losses": counted.heads,
            "backward": counted.backward,
            "prompter": counted.prompter,
        }
        return [
            Row(name=f"part: {name}", value=seconds[name], unit="s", limit=size * operations / product)
            for name, operations in limits.items()
        ]

    def memory(self) -> list[Row]:
        """Peak memory of a step: on a GPU without and with activation checkpointing, on a CPU of the process."""
        if self.device.type != "cuda":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return [Row(name="peak memory of the process", value=peak / 2**30, unit="GiB")]
        shown = []
        for name, enabled in (("peak memory", False), ("peak memory, activation checkpointing", True)):
            set_checkpointing(self.model, enabled)
            torch.cuda.reset_peak_memory_stats()
            self.ours()
            shown.append(Row(name=name, value=torch.cuda.max_memory_allocated() / 2**30, unit="GiB"))
        return shown

    def _forward_backward(self, labels: SoftLabels) -> None:
        batch = self.inputs.batch
        ignore_GG = same_pairs(batch.video_id_B, batch.text_id_B)
        counts = GlobalCounts(*count_local(batch, labels))
        terms = self.objective(batch, lambda v, t: GlobalFeatures(v, t, ignore_GG, 0), 1, counts, labels)
        self._backward(terms.total)

    def _backward(self, total: torch.Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            total.backward()
        self.model.zero_grad()


def _goal(step: Step) -> Target:
    if step.device.type == "cuda":
        return Target(at_least=3.0)
    return Target(at_least=1.8 if step.dtype == torch.bfloat16 else 1.15)


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
    )
    bank_ME = torch.nn.functional.normalize(
        torch.randn(NUM_ENTITIES, config.projection_size, generator=generator), dim=1
    )
    return replace(Inputs(batch, bank_ME), batch=batch.to(device), bank_ME=bank_ME.to(device))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=4, help="samples of a step (default 4)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--small", action="store_true", help="a model of toy size: to see that it runs")


if __name__ == "__main__":
    main("step", rows, add_arguments=_arguments)
