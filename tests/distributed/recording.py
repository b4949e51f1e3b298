"""Runs of `train` that note what each rank was given and what gradients came out of DeepSpeed."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

import alpro_stream.run
import alpro_stream.train.engine
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run
from alpro_stream.train.metrics import read_metrics

PRELOAD = ("alpro_stream.run",)
NO_NOISE = {"model.video.drop_path": 0.0, "model.text.dropout": 0.0}
# Adam divides a gradient by its size: where that is of the size of rounding, whole steps would differ.
NO_MAGNIFIED_ROUNDING = {"train.optimizer.eps": 1e-4}


@dataclass
class Case:
    """A run of three steps."""

    name: str
    changes: dict


@dataclass
class Record:
    """What one rank saw of a case; weights and losses on the first rank only."""

    keys: list = field(default_factory=list)
    gradients: dict = field(default_factory=dict)
    plain_gradients: dict = field(default_factory=dict)
    num_partitioned: int = 0
    feature_gap: float = 0.0
    metrics: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)


class RecordingEngine(alpro_stream.train.engine.Engine):
    """The engine, which notes the samples of every graph and the gradients before the first update."""

    record: Record

    def __init__(self, module, config, *rest):
        super().__init__(module, config, *rest)
        self.is_plain = config.zero_stage == 0 and config.num_micro_batches == 1 and rest[1].size == 1

    def __call__(self, micro, gather, *rest):
        if self.is_plain and not self.record.plain_gradients:
            parameters = dict(self.module.named_parameters())
            total = self.module(micro, gather, *rest).total
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            self.record.plain_gradients = {
                name: torch.zeros_like(parameters[name]) if gradient is None else gradient
                for name, gradient in zip(parameters, gradients, strict=True)
            }
        self.record.keys.append((micro.step, micro.first_lane, micro.keys))
        return super().__call__(micro, self._comparing(gather), *rest)

    def _comparing(self, gather):
        """Gathers, and notes how far a micro-batch's features are from those that the others saw of it."""

        def gather_and_compare(video, text):
            found = gather(video, text)
            rows = slice(found.first_row, found.first_row + len(video))
            gaps = [(found.video_GE[rows] - video).abs().max(), (found.text_GE[rows] - text).abs().max()]
            self.record.feature_gap = max(self.record.feature_gap, *map(float, gaps))
            return found

        return gather_and_compare

    def step(self, learning_rate):
        if self._engine.is_gradient_accumulation_boundary() and not self.record.gradients:
            for name, parameter in self.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                self.record.gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        super().step(learning_rate)
        self.record.num_partitioned = sum(
            getattr(parameter, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE
            for parameter in self.module.parameters()
        )


def partition_everything(engine, max_grad_norm, rank_batch, original=alpro_stream.train.engine.deepspeed_config):
    """DeepSpeed's settings with ZeRO 3 partitioning the small parameters too, which it keeps whole by default."""
    settings = original(engine, max_grad_norm, rank_batch)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def train_cases(corpus: Path, directory: Path, cases: list[Case]) -> dict[str, Record]:
    """Trains every case on this rank."""
    alpro_stream.run.Engine = RecordingEngine
    alpro_stream.train.engine.deepspeed_config = partition_everything
    return {case.name: _train(corpus, directory / case.name, case) for case in cases}


def _train(corpus, run_dir, case):
    changes = {"train.max_steps": 3, "train.checkpoint_every": 10, **NO_NOISE, **NO_MAGNIFIED_ROUNDING, **case.changes}
    RecordingEngine.record = record = Record()
    finished = train(RunConfig.model_validate(tiny_run(corpus, run_dir, changes)))
    if torch.distributed.get_rank() == 0:
        record.metrics = read_metrics(run_dir)
        record.weights = load_file(finished.checkpoint / WEIGHTS_FILE)
    return record
