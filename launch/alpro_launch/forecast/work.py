"""What a step computes: the objective of the run, run on tensors without contents, and counted operation by operation.

Nothing is allocated and nothing is computed, so the published model takes seconds on any machine. What is counted is
what this implementation executes; `alpro_stream.model.operations` counts the method.

Cost is linear in the samples of a micro-batch, but for what is done once for each (casts of the weights, starting an
operation), so two sizes are looked at and the line through them is followed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from alpro_stream.losses.answers import AnswerCounts, AnswerObjective
from alpro_stream.losses.objective import (
    DualObjective,
    GlobalCounts,
    GlobalFeatures,
    PretrainObjective,
    SoftLabels,
    count_local,
    same_pairs,
)
from alpro_stream.manifest import Kind
from alpro_stream.model.alpro import DualEncoder, ModelConfig, build_model
from alpro_stream.model.checkpointing import set_checkpointing
from alpro_stream.prompter.labels import Labeller
from alpro_stream.run import RunConfig
from alpro_stream.stream.batch import Batch
from alpro_stream.train.rehearsal import made_up_batch

_SIZES = (2, 4)
_aten = torch.ops.aten
# Fused attention on a CPU, which torch's own counter does not know.
_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(  # type: ignore[no-untyped-call]
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_: sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
        grad.shape, q.shape, k.shape, v.shape
    ),
}
_FREE = {_aten.detach, _aten._unsafe_view, torch.ops.prim.device}


@dataclass(frozen=True, slots=True)
class Work:
    """Something that is computed.

    Attributes:
        flops: floating point operations of matrix products and attention.
        num_bytes: that all other operations read and write.
        calls: operations that are started.
    """

    flops: float = 0.0
    num_bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes, self.calls + other.calls)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.num_bytes * factor, self.calls * factor)


@dataclass(frozen=True, slots=True)
class MicroWork:
    """What a micro-batch computes.

    Attributes:
        features: the forward pass without a graph, which several micro-batches have before their own.
        forward: with a graph.
        backward: with what activation checkpointing computes again.
        labels: of the prompter; nothing without PEM.
        saved_bytes: activations that the backward pass waits for.
    """

    features: Work
    forward: Work
    backward: Work
    labels: Work
    saved_bytes: float

    def __add__(self, other: "MicroWork") -> "MicroWork":
        return MicroWork(
            self.features + other.features,
            self.forward + other.forward,
            self.backward + other.backward,
            self.labels + other.labels,
            self.saved_bytes + other.saved_bytes,
        )

    def __mul__(self, factor: float) -> "MicroWork":
        return MicroWork(
            self.features * factor,
            self.forward * factor,
            self.backward * factor,
            self.labels * factor,
            self.saved_bytes * factor,
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a run that its configuration does not hold.

    Attributes:
        vocab_size: rows of the word embeddings.
        num_entities: M; 0 without PEM.
        num_answers: 0 but for question answering.
        prompter: model of the prompter; None without PEM.
    """

    vocab_size: int
    num_entities: int = 0
    num_answers: int = 0
    prompter: ModelConfig | None = None


@dataclass(frozen=True, slots=True)
class RunWork:
    """What micro-batches of any size compute, of each kind that the run has.

    Attributes:
        by_size: for each kind, that of the two sizes that were looked at.
        parameters: of the model.
        trained: those that have a gradient.
        prompter_parameters: of the prompter.
        num_tensors: parameters as tensors, trained ones.
    """

    by_size: Mapping[Kind, tuple[MicroWork, MicroWork]]
    parameters: int
    trained: int
    prompter_parameters: int
    num_tensors: int

    def of(self, kind: Kind, size: float) -> MicroWork:
        """Of a micro-batch of `size` samples."""
        small, large = self.by_size[kind]
        further = (size - _SIZES[0]) / (_SIZES[1] - _SIZES[0])
        return small * (1 - further) + large * further


def work_of(config: RunConfig, sizes: Sizes, kinds: Mapping[Kind, float]) -> RunWork:
    """Counts what a run computes.

    Args:
        config: of the run.
        sizes: what it does not hold.
        kinds: of its steps.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = _objective(config, sizes)
        labeller = _labeller(config, sizes)
        found: dict[Kind, tuple[MicroWork, MicroWork]] = {}
        for kind in sorted(kinds, reverse=True):  # Videos first.
            if kind == "image" and config.model.video.still == "repeat" and "video" in found:
                found[kind] = found["video"]  # Read as a clip of equal frames.
                continue
            small, large = (_trace(config, sizes, objective, labeller, kind, size) for size in _SIZES)
            found[kind] = (small, large)
        trained = [p.numel() for p in objective.parameters() if p.requires_grad]
        prompter = 0 if labeller is None else sum(p.numel() for p in labeller.encoder.parameters())
        total = sum(p.numel() for p in objective.parameters())
    return RunWork(found, total, sum(trained), prompter, len(trained))


class _Prompter:
    """A labeller with the encoder that it was made of."""

    def __init__(self, model: ModelConfig, config: RunConfig, sizes: Sizes) -> None:
        assert config.prompter is not None
        self.encoder = DualEncoder(model, sizes.vocab_size)
        bank_ME = torch.zeros(sizes.num_entities, model.projection_size)
        banks = {"video": bank_ME, "image": bank_ME}
        pem, patch_size = config.losses.pem, model.video.patch_size
        self.label = Labeller(self.encoder, banks, pem, patch_size, config.prompter.precision)


def _objective(config: RunConfig, sizes: Sizes) -> nn.Module:
    model = build_model(config.task, config.model, sizes.vocab_size, sizes.num_entities, sizes.num_answers)
    objective: nn.Module
    if isinstance(model, DualEncoder):
        objective = DualObjective(model)
    elif config.task == "question_answering":
        objective = AnswerObjective(model, [str(number) for number in range(sizes.num_answers)])
    else:
        objective = PretrainObjective(model, config.used_losses)
    for encoder in config.frozen:
        (model if isinstance(model, DualEncoder) else model.dual).get_submodule(encoder).requires_grad_(False)
    set_checkpointing(objective, config.train.engine.activation_checkpointing)
    return objective


def _labeller(config: RunConfig, sizes: Sizes) -> _Prompter | None:
    return _Prompter(sizes.prompter, config, sizes) if sizes.prompter is not None and sizes.num_entities else None


def _trace(
    config: RunConfig, sizes: Sizes, objective: nn.Module, labeller: _Prompter | None, kind: Kind, size: int
) -> MicroWork:
    """One micro-batch, forward and backward."""
    video = config.model.video
    frames = (video.num_frames if kind == "video" else 1, video.image_size)
    batch = made_up_batch(kind, size, 1, frames, config.stream.text.num_tokens, sizes.vocab_size, 0)
    is_bf16 = config.train.engine.precision == "bf16"
    lower = torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext()
    labels, features = Work(), Work()
    if labeller is not None:
        with _counting() as counted:
            labeller.label(batch.frames_BTHWC, batch.boxes_B4, kind)
        labels = counted.work
    if not isinstance(objective, AnswerObjective):
        with _counting() as counted, torch.no_grad(), lower:
            objective(batch, None, 1)
        features = counted.work
    saved = _Saved(objective)
    arguments = _arguments(objective, batch, sizes)
    with _counting() as counted, saved.hooks(), lower:
        terms = objective(*arguments)
    forward = counted.work
    with _counting() as counted:
        terms.total.backward()
    objective.zero_grad()
    return MicroWork(features, forward, counted.work, labels, saved.num_bytes)


def _arguments(objective: nn.Module, batch: Batch, sizes: Sizes) -> tuple[Any, ...]:
    """What the objective is called with, as `alpro_stream.train.step` does."""
    if isinstance(objective, AnswerObjective):
        return batch, 1, AnswerCounts(*objective.count_local(batch))

    def gather(video_BE: Tensor, text_BE: Tensor) -> GlobalFeatures:
        return GlobalFeatures(video_BE, text_BE, same_pairs(batch.video_id_B, batch.text_id_B), batch.valid_B, 0)

    if isinstance(objective, DualObjective):
        return batch, gather, 1
    labels = None
    if sizes.num_entities:
        labels = SoftLabels(torch.zeros(len(batch), sizes.num_entities), batch.valid_B)
    return batch, gather, 1, GlobalCounts(*count_local(batch, labels)), labels


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation that is started inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            self.work += Work(float(_ATTENTION[packet](*args)), 0.0, 1)
        elif packet in flop_registry:
            count: Callable[..., int] = flop_registry[packet]
            self.work += Work(float(count(*args, **named, out_val=out)), 0.0, 1)
        elif not func.is_view and packet not in _FREE:
            tensors = [leaf for leaf in tree_leaves((args, named, out)) if isinstance(leaf, Tensor)]
            self.work += Work(0.0, float(sum(t.numel() * t.element_size() for t in tensors)), 1)
        return out


@contextmanager
def _counting() -> Iterator[_Counter]:
    counter = _Counter()
    with counter:
        yield counter


class _Saved:
    """Bytes that autograd keeps, each storage once and without the parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._sizes: dict[int, int] = {}
        self._not = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    @property
    def num_bytes(self) -> float:
        return float(sum(size for key, size in self._sizes.items() if key not in self._not))

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._sizes[storage._cdata] = storage.nbytes()
        return tensor
