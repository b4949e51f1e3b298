"""Whether prompter and trainer start and fit into the memory, each made as the run makes it."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from alpro_launch.preflight_checks.lines import Line, counted
from alpro_launch.preflight_checks.memory import Use, gpu_bytes, machine_limit, peak_bytes, reset_peak
from alpro_stream.manifest import KINDS
from alpro_stream.model.folder import read_description
from alpro_stream.prompter.client import PrompterClient
from alpro_stream.run import (
    RunConfig,
    RunData,
    build_objective,
    describe_model,
    find_prompter,
    made_up_batches,
    start_prompter,
)
from alpro_stream.train.distributed import World
from alpro_stream.train.rehearsal import rehearse

# What NCCL takes of the shared memory for each rank, with room to spare.
_NCCL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a prompter did and takes.

    Attributes:
        seconds: for the labels of a rank's batch.
        machine_bytes: memory of its process; 0 where it is part of the trainer.
        gpu_bytes: of the GPU, that it took.
    """

    seconds: float
    machine_bytes: int = 0
    gpu_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the trainer; bytes as of `Use`."""

    prompter: Labelled | None
    decoder_bytes: int
    decoder_gpu_bytes: int
    other_gpu_bytes: int


def measure_labels(config: RunConfig, world: World, data: RunData, folder: Path, parts: ExitStack) -> Labelled:
    """Starts the prompter, which stays, with made-up prompts: those of the run take a while, and are then stored.

    Args:
        config: of the run.
        world: the ranks.
        data: of the run.
        folder: gets the prompts and the log.
        parts: gets the prompter's end.

    Raises:
        AlproError: there is none, it does not fit the run or does not start.
    """
    found = find_prompter(config)
    assert found is not None
    before, _ = gpu_bytes(world.device)
    num_entities, size = len(data.entities), read_description(found[0]).model.projection_size
    bank = folder / "bank.safetensors"
    save_file({kind: torch.randn(num_entities, size) for kind in KINDS}, bank)
    prompter = start_prompter(config, world, found[0], bank, num_entities, folder / "prompter.log")
    parts.callback(prompter.close)
    batch = made_up_batches(config, data, world)[0].to(world.device)
    for _ in range(2):  # The first one waits for its start.
        started = time.perf_counter()
        prompter.submit(batch)
        prompter.collect(batch)
        seconds = time.perf_counter() - started
    if not isinstance(prompter, PrompterClient):
        return Labelled(seconds)
    return Labelled(seconds, peak_bytes(prompter.pid), gpu_bytes(world.device)[0] - before)


def judge_labels(found: Sequence[Labelled], rank_batch: int, step_s: float | None) -> list[Line]:
    """One line. How long it takes is no fault: the step may take longer, which is not known before the first run."""
    seconds = max(labelled.seconds for labelled in found)
    text = f"labels of {counted(rank_batch, 'clip')} in {seconds:.3f} s"
    return [Line("prompter", text, f"a step takes {step_s:.3f} s" if step_s else "")]


def measure_memory(config: RunConfig, world: World, data: RunData, beside: Beside) -> tuple[Use, Use | None]:
    """Makes a step as the run rehearses it, but not compiled, on all ranks.

    Returns:
        What is used of the machine, and of the GPU where there is one.

    Raises:
        AlproError: the model cannot be built, or the step does not fit into the GPU.
    """
    reset_peak(world.device)
    with world.all_or_none("all ranks to have built the model"):
        objective = build_objective(config, data)
    batches, train = made_up_batches(config, data, world), config.train
    on_gpu = rehearse(objective, batches, len(data.entities), train.engine, train.optimizer, world)
    prompter = beside.prompter or Labelled(0)
    limit, limit_of = machine_limit()
    use = Use(peak_bytes(), prompter.machine_bytes, beside.decoder_bytes, limit, limit_of)
    if world.device.type != "cuda":
        return use, None
    name, (_, total) = torch.cuda.get_device_name(world.device), gpu_bytes(world.device)
    return use, Use(on_gpu, prompter.gpu_bytes, beside.decoder_gpu_bytes, total, name, beside.other_gpu_bytes)


def num_parameters(config: RunConfig, data: RunData) -> int:
    """Of the model that is trained; nothing is allocated."""
    with torch.device("meta"):
        model = describe_model(config, data).build()
    return sum(parameter.numel() for parameter in model.parameters())


def shared_bytes(config: RunConfig, world: World) -> int:
    """Of /dev/shm, for a rank: the prompter's buffers, or on a GPU what NCCL takes. Decoders use none."""
    if world.device.type == "cuda":
        return _NCCL_BYTES
    if not config.uses_pem or config.prompter is None or config.prompter.placement == "inline":
        return 0
    video, rank_batch = config.model.video, config.stream.global_batch // world.size
    return (config.prompter.lookahead + 1) * rank_batch * video.num_frames * video.image_size**2 * 3
