"""A step on made-up batches before anything else: what does not fit or compile is found in the first minute."""

import gc
import logging
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from alpro_stream.errors import ConfigError
from alpro_stream.losses.objective import SoftLabels
from alpro_stream.stream.batch import Batch
from alpro_stream.train.distributed import World
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig
from alpro_stream.train.step import Step

logger = logging.getLogger(__name__)


def made_up_batch(
    kind: Literal["video", "image"],
    size: int,
    num_lanes: int,
    frames_shape: tuple[int, int],
    num_tokens: int,
    vocab_size: int,
    rank: int,
) -> Batch:
    """A batch of a rank with the shapes of a real one and nothing in it to learn.

    Args:
        kind: of its samples.
        size: B, samples.
        num_lanes: of the rank.
        frames_shape: frames of a clip, and their side in pixels.
        num_tokens: L.
        vocab_size: ids are below this.
        rank: no two ranks have the same videos and texts.
    """
    draw = torch.Generator().manual_seed(rank)
    num_frames, side = frames_shape
    ids_BL = torch.randint(vocab_size, (size, num_tokens), generator=draw)
    hidden_BL = torch.rand(size, num_tokens, generator=draw) < 0.15
    hidden_BL[:, 1] = True  # of short texts too
    own_B = rank * size + torch.arange(size)
    return Batch(
        step=0,
        source="rehearsal",
        kind=kind,
        first_lane=rank * num_lanes,
        num_lanes=num_lanes,
        keys=("rehearsal",) * size,
        captions=("",) * size,
        frames_BTHWC=torch.randint(256, (size, num_frames, side, side, 3), generator=draw, dtype=torch.uint8),
        ids_BL=ids_BL,
        mask_BL=torch.ones_like(ids_BL),
        mlm_ids_BL=ids_BL,
        mlm_labels_BL=ids_BL.where(hidden_BL, -100),
        boxes_B4=torch.tensor([0, 0, 1, 1]).repeat(size, 1),
        video_id_B=own_B,
        text_id_B=own_B,
        noise_B2N=torch.rand(size, 2, size // num_lanes, generator=draw) + 0.1,
        valid_B=torch.ones(size, dtype=torch.bool),
        answers=("",) * size,
        num_quarantined=0,
    )


def rehearse(
    module: nn.Module,
    batches: Sequence[Batch],
    num_entities: int,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
) -> int:
    """Makes a whole step with each batch, update and all, in an engine that is thrown away.

    Args:
        module: a copy of the objective; it is of no use afterwards.
        batches: of this rank, one of each kind that the run has.
        num_entities: M of the soft labels; 0 without PEM.
        engine: how to compute.
        optimizer: AdamW's settings.
        world: the ranks.

    Returns:
        Most bytes of the GPU that tensors took; 0 on a CPU.

    Raises:
        ConfigError: a step does not fit into the memory of the GPU.
    """
    started = time.perf_counter()
    size = len(batches[0])
    try:
        rehearsed = Engine(module, engine, optimizer, world, size)
        step = Step(rehearsed, world, engine.num_micro_batches, seed=0)
        for batch in batches:
            labels = None
            if num_entities:
                labels_BM = torch.full((size, num_entities), 1 / num_entities, device=world.device)
                labels = SoftLabels(labels_BM, torch.ones(size, dtype=torch.bool, device=world.device))
            with world.waiting("the rehearsed step of all ranks", at_work=True):
                step.train(batch.to(world.device), labels, optimizer.learning_rate)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {size} samples a rank does not fit into the GPU's memory ({str(error).splitlines()[0]}); "
            "raise train.engine.num_micro_batches, set train.engine.activation_checkpointing=true, take more ranks or "
            "a smaller stream.global_batch"
        ) from error
    peak_bytes = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else 0
    rehearsed.close()
    del rehearsed, step
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    kinds = " and ".join(f"{size} {batch.kind}s" for batch in batches)
    peak = f", at most {peak_bytes / 2**30:.1f} GiB of the GPU" if peak_bytes else ""
    logger.info("rehearsal: steps of %s a rank work, %.1f s%s", kinds, time.perf_counter() - started, peak)
    return peak_bytes
