"""What saving a checkpoint costs the trainer, and going on from it: the code of `alpro train`, without the training.

A save is one piece: the trainer waits until engine state and model are written, flushed to the disk, hashed and
published (`alpro_stream.train.checkpoint.publish`); nothing of it goes on beside the next step. Limits, in the same
sitting and with as many bytes: for `save` writing plain memory to one new file, with fsync; for `load`, which checks
all digests first, reading the same files and dropping them (both find them in the page cache). `the trainer waits` is
beside the time in which the memory could be copied away, the least that a save in the background would cost.

The demo's model and the published one, each without ZeRO (0) and with its optimizer state sharded (1), in one rank. A
size is left out where memory or disk do not have the room. `--folder` chooses the disk.
"""

import argparse
import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from alpro_stream.config import load_config, validate
from alpro_stream.errors import ConfigError
from alpro_stream.model.alpro import ModelConfig
from alpro_stream.model.folder import ModelDescription, write_model
from alpro_stream.model.operations import count_parameters
from alpro_stream.run import RunConfig
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.shards import write_tokenizer
from alpro_stream.train import checkpoint
from alpro_stream.train import engine as engine_module
from alpro_stream.train.distributed import World, join_world
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig
from benchmarks.harness import Measurement, Row, main, measure
from benchmarks.timing import Stopwatch, copy_rate, read_seconds, write_seconds

NUM_TOKENS, NUM_ENTITIES, VOCAB_SIZE = 30, 1000, 30522
FOLDER = Path("runs/bench/checkpoint")
ZERO_STAGES = (0, 1)
_BYTES_OF_A_PARAMETER = 4
# Of a parameter and in its size: itself, gradient, two moments, ZeRO's own copy; and while saving one more of the model
# and a flat one. On the disk: a checkpoint of four, the one before it, and as many plain bytes.
_COPIES_IN_MEMORY, _COPIES_ON_DISK = 8, 14


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Saves and loads in turn with plain writes and reads, size by size."""
    repetitions = (1 if arguments.quick else 5) if arguments.repetitions is None else arguments.repetitions
    if repetitions < 1:
        raise ConfigError(f"--repetitions {repetitions}: at least 1 is needed")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    world = join_world(600)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as name:
        folder = Path(name)
        for size, config in _sizes(arguments.quick).items():
            free = psutil.virtual_memory().available, shutil.disk_usage(folder).free
            if problem := lack_of_room(_num_parameters(config), *free):
                print(f"left out: {size}: {problem}")
                continue
            for stage in ZERO_STAGES:
                run_dir, title = folder / f"{size}-{stage}", f"{size}, ZeRO {stage}"
                found += _measure(run_dir, title, config, stage, world, repetitions)
    if not found:
        raise ConfigError(f"no size fits into memory and the disk of {arguments.folder}; choose another with --folder")
    return found


def lack_of_room(num_parameters: int, memory: int, disk: int) -> str:
    """Why a model of that size cannot be measured here; empty where it can.

    Args:
        num_parameters: of the model.
        memory: bytes that are free.
        disk: bytes that are free on the one that is measured.
    """
    size = num_parameters * _BYTES_OF_A_PARAMETER
    if memory < _COPIES_IN_MEMORY * size:
        return f"{_COPIES_IN_MEMORY * size / 2**30:.1f} GiB of memory are needed, {memory / 2**30:.1f} are free"
    if disk < _COPIES_ON_DISK * size:
        return f"{_COPIES_ON_DISK * size / 2**30:.1f} GiB of disk are needed, {disk / 2**30:.1f} are free"
    return ""


class Sum(nn.Module):
    """Stands in for the objective: a gradient for each parameter of the model, at no cost."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        """Of all parameters."""
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum()


@dataclass
class Saved:
    """A model in an engine that has made a step, and the checkpoint that it wrote last."""

    run_dir: Path
    world: World
    description: ModelDescription
    tokenizer: Tokenizer
    engine: Engine
    step: int = 0
    newest: Path = Path()
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all files of the newest checkpoint."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def files(self) -> list[Path]:
        """Of the newest checkpoint."""
        return sorted(path for path in self.newest.rglob("*") if path.is_file())

    def save(self) -> float:
        """Seconds that the trainer waits for a save, as it makes it."""
        self.step += 1
        with Stopwatch() as watch:
            watch.on(Engine, "save", "engine")
            watch.on(Saved, "_write_model", "model")
            watch.on(checkpoint, "_flush", "flush")
            watch.on(checkpoint, "_digests", "digests")
            started = time.perf_counter()
            writers: list[Callable[[Path], None]] = [self.engine.save, self._write_model, self._write_state]
            self.newest = checkpoint.publish(self.run_dir, self.step, self.world, writers, keep=1)
            seconds = time.perf_counter() - started
        for name, taken in watch.seconds.items():
            self.parts.setdefault(name, []).append(sum(taken))
        return seconds

    def load(self) -> float:
        """Seconds in which the engine has the newest checkpoint again."""
        with Stopwatch() as watch:
            watch.on(engine_module, "check_files", "check")
            started = time.perf_counter()
            self.engine.load(self.newest)
            seconds = time.perf_counter() - started
        self.parts.setdefault("check", []).append(sum(watch.seconds["check"]))
        return seconds

    def _write_model(self, directory: Path) -> None:
        prefix = "model."
        parameters = {name.removeprefix(prefix): tensor for name, tensor in self.engine.full_parameters().items()}
        write_model(directory, self.description, parameters, self.tokenizer)

    def _write_state(self, directory: Path) -> None:
        checkpoint.write_state(directory, {"step": self.step})


def build(run_dir: Path, config: ModelConfig, zero_stage: int, world: World) -> Saved:
    """The model with the four losses' heads, after one step: until then there is no optimizer state."""
    tokenizer = Tokenizer(str(write_tokenizer(run_dir / "tokenizer")), NUM_TOKENS)
    description = _description(config)
    settings = validate(EngineConfig, {"zero_stage": zero_stage}, source="benchmarks/checkpoint.py")
    engine = Engine(Sum(description.build()), settings, OptimizerConfig(), world, rank_batch=1)
    engine.backward(engine())
    engine.step(1e-4)
    return Saved(run_dir, world, description, tokenizer, engine)


def _measure(
    folder: Path, name: str, config: ModelConfig, zero_stage: int, world: World, repetitions: int
) -> list[Row]:
    saved = build(folder, config, zero_stage, world)
    try:
        saved.save()
        num_bytes, plain = saved.num_bytes, folder / "plain"
        found = measure(
            {
                "save": saved.save,
                "write": functools.partial(write_seconds, plain, num_bytes),
                "load": saved.load,
                "read": lambda: read_seconds(saved.files),
            },
            repetitions,
        )
        # Those that count: without the first of all and the warm-up.
        parts = {part: statistics.median(taken[-repetitions:]) for part, taken in saved.parts.items()}
        copy_s = num_bytes / copy_rate(min(num_bytes, 2**28))
    finally:
        saved.engine.close()
        shutil.rmtree(folder)
    rates = {part: _mb_per_s(seconds, num_bytes) for part, seconds in found.items()}
    of_load = {"check s": parts.pop("check")}
    of_save = {"MB": num_bytes / 1e6, **{f"{part} s": seconds for part, seconds in parts.items()}}
    return [
        Row.of(f"save, {name}", rates["save"], "MB/s", rates["write"], details=of_save, limit_of="write and fsync"),
        Row.of(f"load, {name}", rates["load"], "MB/s", rates["read"], details=of_load, limit_of="reading the files"),
        Row.of(f"the trainer waits, {name}", found["save"], "s", copy_s, limit_of="memory copy"),
    ]


def _mb_per_s(seconds: Measurement, num_bytes: int) -> Measurement:
    return Measurement(tuple(num_bytes / 1e6 / each for each in seconds.samples))


def _sizes(quick: bool) -> dict[str, ModelConfig]:
    if quick:
        return {"tiny": validate(ModelConfig, TINY_MODEL, source="benchmarks/checkpoint.py")}
    return {"demo": load_config(RunConfig, "configs/demo/pretrain.yaml", []).model, "published": ModelConfig()}


def _description(config: ModelConfig) -> ModelDescription:
    return ModelDescription(
        task="pretrain",
        model=config,
        vocab_size=VOCAB_SIZE,
        num_tokens=NUM_TOKENS,
        entities=tuple(f"entity {number}" for number in range(NUM_ENTITIES)),
    )


def _num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return count_parameters(_description(config).build())["total"]


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = {
        f"{name}_million_parameters": round(_num_parameters(config) / 1e6, 1)
        for name, config in _sizes(arguments.quick).items()
    }
    return {**sizes, "vocab_size": VOCAB_SIZE, "entities": NUM_ENTITIES}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=FOLDER, help="on the disk to measure (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, help="of each (5; 1 with --quick)")


if __name__ == "__main__":
    main("checkpoint", rows, add_arguments=_arguments, describe_content=_describe)
