"""Whole steps of the engine that `alpro train` uses, optimizer included, with each stage of ZeRO on one rank.

One rank has nothing to share with others: what a stage costs here is its own work. Labels are there already.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from alpro_stream.losses.objective import ObjectiveConfig, PretrainObjective, SoftLabels
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.operations import pretraining_operations
from alpro_stream.train.distributed import join_world
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig
from alpro_stream.train.rehearsal import made_up_batch
from alpro_stream.train.step import Step
from benchmarks.gpu_pieces.piece import Parts, Setting, peak_gib
from benchmarks.harness import Measurement, Row
from benchmarks.step import NUM_ENTITIES, NUM_TOKENS, SMALL, VOCAB_SIZE
from benchmarks.timing import matrix_product_rate, repeat


def parts(setting: Setting) -> Parts:
    # 3 last: DeepSpeed replaces functions of torch for it, for good.
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    return {f"whole step, ZeRO {stage}": partial(measured, setting, stage) for stage in stages}


def measured(setting: Setting, stage: Literal[0, 1, 2, 3]) -> Sequence[Row]:
    """Samples of a step of one stage, after one that does not count."""
    config = SMALL if setting.is_quick else ModelConfig()
    size = 2 if setting.is_quick else 32
    torch.manual_seed(0)
    heads = Heads.of("pretrain", NUM_ENTITIES)
    objective = PretrainObjective(AlproModel(config, VOCAB_SIZE, heads), ObjectiveConfig())
    world = join_world(60)
    how = EngineConfig(zero_stage=stage, precision=setting.precision)
    engine = Engine(objective, how, OptimizerConfig(), world, size)
    try:
        shape = (config.video.num_frames, config.video.image_size)
        batch = made_up_batch("video", size, 1, shape, NUM_TOKENS, VOCAB_SIZE, rank=0).to(world.device)
        labels_BM = torch.full((size, NUM_ENTITIES), 1 / NUM_ENTITIES, device=world.device)
        labels = SoftLabels(labels_BM, torch.ones(size, dtype=torch.bool, device=world.device))
        step = Step(engine, world, num_micro_batches=1, seed=0)
        seconds = repeat(lambda: step.train(batch, labels, 1e-4), setting.repetitions(7))
        dtype = torch.bfloat16 if setting.is_cuda else torch.float32
        product = matrix_product_rate(8192 if setting.is_cuda else 256, dtype, world.device, count=5)
        details = {"clips/s": size / statistics.median(seconds), **peak_gib(world.device)}
    finally:
        engine.close()
    counted = pretraining_operations(config, NUM_TOKENS, VOCAB_SIZE, heads)
    operations = size * (counted.forward + counted.backward) / 1e12
    rates = Measurement(tuple(operations / each for each in seconds))
    name = f"whole step, {setting.precision}, batch {size}, ZeRO {stage}"
    return [Row.of(name, rates, "TFLOP/s", product / 1e12, details=details, limit_of="matrix product")]
