"""One step of training, cut into micro-batches: what the losses see depends neither on these nor on the ranks."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alpro_stream.losses.answers import AnswerCounts, AnswerObjective
from alpro_stream.losses.objective import (
    DualObjective,
    GlobalCounts,
    GlobalFeatures,
    SoftLabels,
    count_local,
    same_pairs,
)
from alpro_stream.stream.batch import Batch
from alpro_stream.train.distributed import World
from alpro_stream.train.engine import Engine


class Step:
    """Runs batches through an engine; every method is called on all ranks.

    Args:
        engine: model and optimizer.
        world: the ranks.
        num_micro_batches: parts of a rank's batch.
        seed: of the run.
    """

    def __init__(self, engine: Engine, world: World, num_micro_batches: int, seed: int) -> None:
        self._engine = engine
        self._world = world
        self._num_parts = num_micro_batches
        self._seed = seed

    def train(self, batch: Batch, labels: SoftLabels | None, rate: float) -> dict[str, Tensor]:
        """Runs the micro-batches and the update.

        Args:
            batch: of this rank.
            labels: of the prompter; None without PEM.
            rate: learning rate of the update.

        Returns:
            This rank's share of each loss, by ``loss/NAME``, and of other figures: the sum over the ranks is the value.
        """
        values: dict[str, Tensor] = {}
        for index, arguments in enumerate(self._calls(batch, labels)):
            self._seed_dropout(batch.step, index)
            terms = self._engine(*arguments)
            self._engine.backward(terms.total)
            self._engine.step(rate)
            _add(values, terms.values)
        return values

    def measure(self, batch: Batch, labels: SoftLabels | None) -> dict[str, Tensor]:
        """The losses of a batch without dropout, gradients and an update; arguments and result as of `train`."""
        values: dict[str, Tensor] = {}
        with self._engine.evaluating():
            for arguments in self._calls(batch, labels):
                _add(values, self._engine(*arguments).values)
        return values

    def _calls(self, batch: Batch, labels: SoftLabels | None) -> list[tuple[Any, ...]]:
        """What the objective is called with, for each micro-batch."""
        micro_batches = batch.micro_batches(self._num_parts)
        shares = self._world.size * self._num_parts
        if isinstance(self._engine.module, AnswerObjective):  # Looks at each question by itself.
            answer_counts = AnswerCounts(*self._world.sum(self._engine.module.count_local(batch)))
            return [(micro, shares, answer_counts) for micro in micro_batches]
        beside = self._arguments(batch, micro_batches, labels)
        gathers = self._gathers(micro_batches)
        return [
            (micro, gather, shares, *rest) for micro, gather, rest in zip(micro_batches, gathers, beside, strict=True)
        ]

    def _arguments(self, batch: Batch, micro_batches: list[Batch], labels: SoftLabels | None) -> list[tuple[Any, ...]]:
        """What contrastive objectives take beside it: nothing for VTC alone, else counts and soft labels."""
        if isinstance(self._engine.module, DualObjective):
            return [()] * len(micro_batches)
        counts = GlobalCounts(*self._world.sum(count_local(batch, labels)))
        if labels is None:
            return [(counts, None)] * len(micro_batches)
        size = len(batch) // len(micro_batches)
        cuts = [slice(i * size, (i + 1) * size) for i in range(len(micro_batches))]
        return [(counts, SoftLabels(labels.labels_BM[cut], labels.keep_B[cut])) for cut in cuts]

    def _gathers(self, micro_batches: list[Batch]) -> list[Callable[[Tensor, Tensor], GlobalFeatures]]:
        """For each micro-batch, how its objective gets the features of the whole global batch."""
        world = self._world
        # One collective for all three.
        facts_B3 = torch.cat(
            [torch.stack([micro.video_id_B, micro.text_id_B, micro.valid_B.long()], dim=1) for micro in micro_batches]
        )
        video_id_G, text_id_G, valid_G = world.gather(facts_B3).unbind(dim=1)
        ignore_GG, valid_G = same_pairs(video_id_G, text_id_G), valid_G.bool()
        size = len(micro_batches[0])
        first_rows = [(world.rank * len(micro_batches) + i) * size for i in range(len(micro_batches))]

        def gather_now(video_BE: Tensor, text_BE: Tensor) -> GlobalFeatures:
            return GlobalFeatures(world.gather(video_BE), world.gather(text_BE), ignore_GG, valid_G, first_rows[0])

        if len(micro_batches) == 1:
            return [gather_now]
        # Several micro-batches: all features first, without a graph, so that each sees the whole global batch.
        features = []
        for index, micro in enumerate(micro_batches):
            self._seed_dropout(micro.step, index)
            features.append(self._engine.features(micro, None, 1))
        video_GE = world.gather(torch.cat([video for video, _ in features]))
        text_GE = world.gather(torch.cat([text for _, text in features]))
        return [_already(GlobalFeatures(video_GE, text_GE, ignore_GG, valid_G, row)) for row in first_rows]

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Dropout and stochastic depth depend on (seed, step, rank, micro-batch), whatever ran before."""
        name = f"dropout {self._seed} {step} {self._world.rank} {micro_batch}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def _add(values: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    for name, value in terms.items():
        key = name if "/" in name else f"loss/{name}"
        values[key] = values.get(key, 0) + value


def _already(known: GlobalFeatures) -> Callable[[Tensor, Tensor], GlobalFeatures]:
    return lambda video_BE, text_BE: known
