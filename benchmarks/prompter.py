"""What a pre-training step costs with the prompter beside it: without labels, with labels inline, with the process.

The three take turns in one trainer: forward, backward and AdamW on made-up clips. `without labels` has labels that cost
nothing, so the difference to `inline` is what labels cost. The process is handed each batch one step ahead; its steps
are timed once its queue is full. With cores to spare (four and more, or a GPU) trainer and prompter have cores of their
own; on fewer the trainer uses all of them, and the prompter's one thread comes on top. A step ends when the device has
done it, as with a trainer that logs each: one that runs ahead of its GPU would wait for labels as long as for the step
in front of them.

Limits, in the same sitting: for steps and labels their operations (`alpro_stream.model.operations`, without AdamW) at
the rate of a plain matrix product, on all cores and nothing beside it; for handing a batch over a copy of it in memory
(none on a GPU, where the copy is only queued).

The memory over exchanges is that of a small model's prompter and of its trainer, after both are warm.
"""

import argparse
import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
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
from alpro_stream.model.cpu_memory import keep_freed_memory
from alpro_stream.model.operations import pretraining_operations
from alpro_stream.model.text_encoder import TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoderConfig
from alpro_stream.prompter.client import InlinePrompter, PrompterClient, PrompterConfig
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stream.batch import Batch
from alpro_stream.train.rehearsal import made_up_batch
from benchmarks.harness import Measurement, Row, Target, main, measure, quotients
from benchmarks.step import NUM_ENTITIES, NUM_TOKENS, VOCAB_SIZE
from benchmarks.timing import copy_rate, matrix_product_rate, wait_for_device

STEPS_OF_A_SAMPLE = 3
FEWEST_SPARE_CORES = 4
# Over fewer, what an allocator takes or gives back once looks like a slope.
FEWEST_EXCHANGES = 3000
# Until caches are full.
WARMUP_EXCHANGES = 500


def sized(image_size: int, width: int, depth: int) -> ModelConfig:
    """A model with the published proportions."""
    num_heads = width // 64
    return ModelConfig(
        video=VideoEncoderConfig(image_size=image_size, width=width, depth=depth, num_heads=num_heads),
        text=TextEncoderConfig(
            width=width,
            num_layers=depth // 2,
            num_multimodal_layers=depth // 2,
            num_heads=num_heads,
            intermediate_size=4 * width,
        ),
    )


MODELS = {"small": sized(32, 64, 2), "middle": sized(112, 384, 6), "base": ModelConfig()}


def make_labeller(model: str, device: torch.device, precision: str, compile: bool) -> Labeller:
    """A prompter of the model's size; built in its process."""
    torch.manual_seed(1)
    config = MODELS[model]
    encoder = DualEncoder(config, VOCAB_SIZE).to(device)
    banks = {"video": torch.randn(NUM_ENTITIES, config.projection_size) / config.projection_size**0.5}
    pem = PemConfig(threshold=0.0)  # A random prompter is sure of nothing.
    return Labeller(encoder, banks, pem, config.video.patch_size, "bf16" if precision == "bf16" else "fp32", compile)


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measures the memory, then the three in turn."""
    if arguments.batch < 2:
        raise ConfigError(f"--batch {arguments.batch}: VTM needs a negative, so at least 2")
    exchanges = arguments.exchanges or (500 if arguments.quick else 3000)
    memory = memory_rows(exchanges)  # First: a trainer that has just dropped a large model gives memory back meanwhile.
    with Bench(arguments) as bench:
        variants = {"without labels": bench.without_labels, "inline": bench.inline, "process": bench.process}
        steps = measure(variants, 3 if arguments.quick else 9)
        # The first round of each is warm-up, here as there.
        waits, labels, inline_labels = (
            Measurement(tuple(values[1:])) for values in (bench.waits, bench.labels, bench.inline_labels)
        )
        limits = bench.limits()
        handing = Measurement(tuple(bench.handing_over[1:]))
        spare = bench.has_spare_cores
    if spare:
        over_inline, waiting = Target(at_most=1.05), Target(at_most=0.01)
    else:
        over_inline, waiting = Target(at_most=1.15), None
    overlap = Measurement(tuple(1 - wait / each for wait, each in zip(waits.samples, labels.samples, strict=True)))
    share = quotients(waits, steps["process"])
    return [
        *(
            Row.of(f"step, {name}", seconds, "s", limits.step_s[name], limit_of="matrix product")
            for name, seconds in steps.items()
        ),
        Row.of("process over inline", quotients(steps["process"], steps["inline"]), "x", target=over_inline),
        Row.of("inline over without labels", quotients(steps["inline"], steps["without labels"]), "x"),
        Row.of("process over without labels", quotients(steps["process"], steps["without labels"]), "x"),
        Row.of("labels, inline", inline_labels, "s", limits.labels_s, limit_of="matrix product"),
        Row.of("labels, process", labels, "s", limits.labels_s, limit_of="matrix product"),
        Row.of("handing a batch over", handing, "s", limits.copy_s, limit_of="memory copy" if limits.copy_s else ""),
        Row.of("wait for labels over step", share, "x", target=waiting),
        Row.of("labels hidden behind the step", overlap, "x"),
        *memory,
    ]


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that the same work takes at the rate of a matrix product, or of a copy in memory.

    Attributes:
        step_s: of a step, by variant.
        labels_s: of the labels of a batch.
        copy_s: of handing a batch over; None on a GPU.
    """

    step_s: dict[str, float]
    labels_s: float
    copy_s: float | None


class Bench:
    """A trainer of one rank with a labeller in its own process and one beside it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        cores = len(os.sched_getaffinity(0))
        trainer_threads, prompter_threads = threads_of(cores)
        self.has_spare_cores = cores >= FEWEST_SPARE_CORES or self.device.type == "cuda"
        torch.set_num_threads(trainer_threads)
        if self.device.type == "cpu":
            keep_freed_memory()  # As `alpro train` does.
        config = MODELS[arguments.model]
        torch.manual_seed(0)
        model = AlproModel(config, VOCAB_SIZE, Heads.of("pretrain", NUM_ENTITIES)).to(self.device)
        self._objective = PretrainObjective(model, ObjectiveConfig())
        if arguments.compile:
            self._objective.compile_parts()
        self._autocast = functools.partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=arguments.precision == "bf16"
        )
        self._operations = pretraining_operations(config, NUM_TOKENS, VOCAB_SIZE, Heads.of("pretrain", NUM_ENTITIES))
        self._dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        self._num_cores = cores
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._batch = _batch(config, arguments.batch).to(self.device)
        labeller = functools.partial(
            make_labeller, arguments.model, self.device, arguments.precision, arguments.compile
        )
        self._inline = InlinePrompter(labeller())
        self._free = self._inline.collect(self._batch)
        self._folder = tempfile.TemporaryDirectory(prefix="alpro-bench-")
        prompter = PrompterConfig(checkpoint=Path("made-up"), lookahead=1, num_threads=prompter_threads, deadline_s=600)
        log, shape = Path(self._folder.name) / "prompter.log", tuple(self._batch.frames_BTHWC.shape)
        self._client = PrompterClient(labeller, shape, NUM_ENTITIES, prompter, log, 0, self.device)
        self.waits: list[float] = []
        self.labels: list[float] = []
        self.inline_labels: list[float] = []
        self.handing_over: list[float] = []

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()
        self._folder.cleanup()

    def without_labels(self) -> float:
        """Seconds of a step whose labels are there already."""
        return self._seconds(lambda: self._train(self._free))

    def inline(self) -> float:
        """Seconds of a step that computes its labels first."""
        spent: list[float] = []

        def step() -> None:
            started = time.perf_counter()
            labels = self._inline.collect(self._batch)
            wait_for_device()
            spent.append(time.perf_counter() - started)
            self._train(labels)

        seconds = self._seconds(step)
        self.inline_labels.append(statistics.mean(spent))
        return seconds

    def process(self) -> float:
        """Seconds of a step that hands the next batch over and collects its own labels."""
        client, batch = self._client, self._batch
        waits: list[float] = []
        labels: list[float] = []
        handing_over: list[float] = []

        def step() -> None:
            started = time.perf_counter()
            client.submit(batch)
            handing_over.append(time.perf_counter() - started)
            started = time.perf_counter()
            found = client.collect(batch)
            waits.append(time.perf_counter() - started)
            labels.append(client.labels_s)
            self._train(found)

        client.submit(batch)
        step()  # Beside it, the labels of the first step that counts.
        waits.clear()
        labels.clear()
        seconds = self._seconds(step)
        client.collect(batch)
        self.waits.append(statistics.mean(waits))
        self.labels.append(statistics.mean(labels))
        self.handing_over.append(statistics.mean(handing_over))
        return seconds

    def limits(self) -> Limits:
        """What step, labels and handing over cost at the least, with all cores for each."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._num_cores)
        on_gpu = self.device.type == "cuda"
        rate = matrix_product_rate(8192 if on_gpu else 1024, self._dtype, self.device)
        num_bytes = self._batch.frames_BTHWC.numel()
        copy_s = None if on_gpu else num_bytes / copy_rate(num_bytes)
        torch.set_num_threads(threads)
        of_one, size = self._operations, len(self._batch)
        without = size * (of_one.step - of_one.prompter) / rate
        labels = size * of_one.prompter / rate
        return Limits(
            # On a GPU too, prompter and trainer share what multiplies.
            {"without labels": without, "inline": without + labels, "process": without + labels},
            labels,
            copy_s,
        )

    def _seconds(self, step: Callable[[], None]) -> float:
        wait_for_device()
        started = time.perf_counter()
        for _ in range(STEPS_OF_A_SAMPLE):
            step()
        return (time.perf_counter() - started) / STEPS_OF_A_SAMPLE

    def _train(self, labels: SoftLabels) -> None:
        batch = self._batch
        ignore_GG = same_pairs(batch.video_id_B, batch.text_id_B)
        counts = GlobalCounts(*count_local(batch, labels))
        with self._autocast():
            terms = self._objective(
                batch, lambda v, t: GlobalFeatures(v, t, ignore_GG, batch.valid_B, 0), 1, counts, labels
            )
        terms.total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        wait_for_device()


def memory_rows(exchanges: int) -> list[Row]:
    """By how much the memory of prompter and trainer grows; the slope over all exchanges but the first."""
    device = torch.device("cpu")
    batch = _batch(MODELS["small"], 4)
    labeller = functools.partial(make_labeller, "small", device, "fp32", False)
    config = PrompterConfig(checkpoint=Path("made-up"), deadline_s=600)
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        log, shape = Path(folder) / "prompter.log", tuple(batch.frames_BTHWC.shape)
        with closing(PrompterClient(labeller, shape, NUM_ENTITIES, config, log, 0)) as client:
            processes = {"prompter": psutil.Process(client.pid), "trainer": psutil.Process()}
            taken: dict[str, list[float]] = {name: [] for name in processes}
            counts = [exchanges * part // 20 for part in range(21)]
            done = -WARMUP_EXCHANGES
            for count in counts:
                while done < count:
                    client.submit(batch)
                    client.collect(batch)
                    done += 1
                gc.collect()
                for name, process in processes.items():
                    taken[name].append(process.memory_full_info().uss / 1000)
    return [
        Row(
            name=f"memory over {exchanges:,} exchanges, {name}",
            value=1000 * statistics.linear_regression(counts, kilobytes).slope,
            unit="kB per 1,000",
            target=Target(at_most=100.0) if exchanges >= FEWEST_EXCHANGES else None,
        )
        for name, kilobytes in taken.items()
    ]


def threads_of(num_cores: int) -> tuple[int, int]:
    """Threads of the trainer and of the prompter; each has cores of its own where there are cores to spare."""
    if num_cores < FEWEST_SPARE_CORES:
        return num_cores, 1
    prompter = num_cores // 4  # Labels are about a sixth of the work of a step.
    return num_cores - prompter, prompter


def _batch(config: ModelConfig, size: int) -> Batch:
    video = config.video
    batch = made_up_batch("video", size, 1, (video.num_frames, video.image_size), NUM_TOKENS, VOCAB_SIZE, 0)
    side = max(1, video.grid // 2)
    return replace(batch, boxes_B4=torch.tensor([[0, 0, side, side]] * size))


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    video = MODELS[arguments.model].video
    trainer_threads, prompter_threads = threads_of(len(os.sched_getaffinity(0)))
    return {
        "model": arguments.model,
        "image_size": video.image_size,
        "width": video.width,
        "batch": arguments.batch,
        "precision": arguments.precision,
        "compiled": arguments.compile,
        "trainer_threads": trainer_threads,
        "prompter_threads": prompter_threads,
    }


def _arguments(parser: argparse.ArgumentParser) -> None:
    default = "base" if torch.cuda.is_available() else "middle"
    parser.add_argument("--model", choices=tuple(MODELS), default=default, help=f"size (here {default})")
    parser.add_argument("--batch", type=int, default=16 if torch.cuda.is_available() else 4, help="samples of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--exchanges", type=int, help="with the prompter, for its memory (3000; 500 with --quick)")


if __name__ == "__main__":
    main("prompter", rows, add_arguments=_arguments, describe_content=_describe)
