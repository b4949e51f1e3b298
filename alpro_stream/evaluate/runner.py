"""One evaluation from the beginning to its files, whatever the task: that is a function of the opened data."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from alpro_stream.evaluate.opening import EvaluationConfig, Opened, of_frames, opened
from alpro_stream.evaluate.result import Write, write_result
from alpro_stream.train.distributed import World

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=EvaluationConfig)


@dataclass(frozen=True)
class Outcome:
    """What a task finds; the same on every rank.

    Attributes:
        metrics: the figures.
        chance: what guessing would reach.
        protocol: all that decides what the figures mean, and is neither the model nor the data nor `of_frames`.
        split: what was asked, with its digest and the number of videos.
        files: what is written beside the result, by name (of `result.SIDE_FILES`); called on the first rank.
        warnings: said once.
    """

    metrics: Mapping[str, Any]
    chance: Mapping[str, Any]
    protocol: Mapping[str, Any]
    split: Mapping[str, Any]
    files: Mapping[str, Write] = field(default_factory=dict)
    warnings: Sequence[str] = ()


Task = Callable[[ConfigT, Opened, World], Outcome]
"""Called on every rank. It refuses in the first seconds what would say nothing after hours."""


def run_task(task: Task[ConfigT], config: ConfigT, world: World | None = None) -> dict[str, Any]:
    """Opens, evaluates and writes; returns what `result.json` holds. Called on every rank.

    Args:
        task: what is evaluated.
        config: on what, and how.
        world: the ranks; None for this process alone.

    Raises:
        AlproError: see `alpro_stream.errors`.
    """
    world = world or World(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with opened(config, world) as data:
        outcome = task(config, data, world)
    result = _result_of(config, data, outcome)
    world.stage.enter("the files of the result")
    with world.all_or_none("the files of rank 0"):
        if world.is_first:
            for warning in outcome.warnings:
                logger.warning("%s", warning)
            write_result(config.out, result, outcome.files)
    return result


def _result_of(config: EvaluationConfig, data: Opened, outcome: Outcome) -> dict[str, Any]:
    """Enough to make it again."""
    trained = data.trained
    return {
        "task": config.task,
        "metrics": dict(outcome.metrics),
        "chance": dict(outcome.chance),
        "protocol": {**of_frames(config, trained), **outcome.protocol},
        "split": {
            **outcome.split,
            "num_trained_on": data.num_trained_on,
            "sources": {source.name: source.content for source in data.sources},
        },
        "checkpoint": {
            "path": str(trained.path),
            "task": trained.description.task,
            "weights_sha256": trained.weights_sha256,
        },
        "config": config.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("alpro-stream", "torch", "transformers", "timm")},
    }
