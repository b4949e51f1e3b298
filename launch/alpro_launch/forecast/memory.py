"""What a rank keeps in the memory of its GPU, in bytes."""

from dataclasses import dataclass

from alpro_launch.forecast.collectives import FLOAT_BYTES, KEPT_PARAMETERS
from alpro_launch.forecast.devices import CONTEXT_BYTES
from alpro_stream.train.engine import BUCKET_ELEMENTS

_MOST = 0.95
"""Of the memory, that tensors get: the allocator leaves some of it in pieces."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a GPU.

    Attributes:
        weights: of the trained model.
        gradients: of the trained parameters.
        optimizer: AdamW's two moments and, from stage 1 on, its own copy of the parameters.
        buckets: gradients on their way to the other ranks.
        activations: that the backward pass of a micro-batch waits for, roughly.
        prompter: its weights.
        decoder: the most that decoding on the GPU takes.
        context: of CUDA, for trainer and prompter.
    """

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    prompter: float
    decoder: float
    context: float

    @property
    def total(self) -> float:
        """Of all."""
        kept = self.weights + self.gradients + self.optimizer + self.buckets + self.activations
        return kept + self.prompter + self.decoder + self.context

    def fits(self, device_bytes: float) -> bool:
        """Whether a GPU with so much memory can train the run."""
        return self.total <= _MOST * device_bytes


def memory_of(
    *,
    parameters: int,
    trained: int,
    zero_stage: int,
    num_ranks: int,
    activations: float,
    prompter_parameters: int = 0,
    decoder_bytes: float = 0.0,
    context_bytes: float = CONTEXT_BYTES,
) -> Memory:
    """Memory of a rank.

    Parameters, gradients and moments are float32: bf16 is autocast, whose copies of weights are among the activations.

    Args:
        parameters: of the model.
        trained: those with a gradient.
        zero_stage: what is spread over the ranks: 1 the optimizer's, 2 gradients too, 3 the parameters too, of which a
            step has all in memory as well if there are fewer than `KEPT_PARAMETERS`.
        num_ranks: that it is spread over.
        activations: bytes that the backward pass of one micro-batch waits for.
        prompter_parameters: of the prompter; 0 without.
        decoder_bytes: of decoding on the GPU.
        context_bytes: of CUDA, in each process.
    """
    own_copy = 1 if zero_stage in (1, 2) else 0
    spread = num_ranks if zero_stage else 1
    num_processes = 2 if prompter_parameters else 1
    # Of stage 3 a rank's share; a step has all of a model that is kept, beside it.
    share = parameters / num_ranks if zero_stage == 3 and num_ranks > 1 else 0.0
    whole = 0.0 if share and parameters >= KEPT_PARAMETERS else parameters
    # A bucket, and what is flattened of it to be sent. Without ZeRO all gradients are flattened at once.
    buckets = 2 * min(BUCKET_ELEMENTS, trained) if zero_stage else trained if num_ranks > 1 else 0
    return Memory(
        weights=FLOAT_BYTES * (share + whole),
        gradients=FLOAT_BYTES * trained / (num_ranks if zero_stage >= 2 else 1),
        optimizer=FLOAT_BYTES * trained * (2 + own_copy) / spread,
        buckets=FLOAT_BYTES * buckets,
        activations=activations,
        prompter=FLOAT_BYTES * prompter_parameters,
        decoder=decoder_bytes,
        context=num_processes * context_bytes,
    )
