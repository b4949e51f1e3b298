"""What ranks exchange in a step, in bytes and seconds: ring algorithms, as nccl-tests and ZeRO's paper count them.

Of M bytes over n ranks each link carries ``(n - 1) / n x M`` for a gather or a scatter of sums, and twice that for a
sum of all (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). A ring over several nodes goes through
the network of each node once, so its slowest link sets the pace.

Rajbhandari et al. 2020 (ZeRO, section 7) count 2 P elements for stages 1 and 2, a scatter of sums and a gather.
DeepSpeed 0.19 sums whole buckets over all ranks (`use_multi_rank_bucket_allreduce`, its default) and then gathers: 3 P.
"""

from dataclasses import dataclass
from math import ceil, log2

from alpro_stream.train.engine import BUCKET_ELEMENTS

FLOAT_BYTES = 4
"""Parameters and gradients are float32: bf16 is autocast."""
_STAGE_0_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed 0.19 sums at a time without ZeRO (`MEMORY_OPT_ALLREDUCE_SIZE`)."""
_FETCHED_ELEMENTS = 50_000_000
"""Parameters that it gathers at a time with stage 3 (`stage3_prefetch_bucket_size`)."""
KEPT_PARAMETERS = 10**9
"""Parameters that DeepSpeed 0.19 does not give up between their uses in a step (`stage3_max_reuse_distance`)."""


@dataclass(frozen=True, slots=True)
class Links:
    """What the ranks are joined by; bytes a second are bus bandwidth, one direction.

    Attributes:
        inside_per_s: of a rank to the others of its node.
        between_per_s: of a whole node to the others.
        latency_s: start of a collective, and each hop of one.
    """

    inside_per_s: float
    between_per_s: float
    latency_s: float

    def slowest_per_s(self, num_nodes: int) -> float:
        """Of the ring over all ranks."""
        return self.inside_per_s if num_nodes == 1 else min(self.inside_per_s, self.between_per_s)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank sends in a step.

    Attributes:
        gradient_bytes: for gradients and parameters, by ZeRO stage.
        gradient_calls: collectives for them, each of which has its latency.
        feature_bytes: for VTC's features and what goes with them.
        feature_calls: collectives for those.
    """

    gradient_bytes: float
    gradient_calls: int
    feature_bytes: float
    feature_calls: int

    @property
    def total_bytes(self) -> float:
        """Of both."""
        return self.gradient_bytes + self.feature_bytes


def gather_bytes(num_bytes: float, num_ranks: int) -> float:
    """Through each link of a ring, until every rank has all `num_bytes`; a scatter of sums takes as many."""
    return (num_ranks - 1) / num_ranks * num_bytes


def sum_bytes(num_bytes: float, num_ranks: int) -> float:
    """Through each link of a ring, until every rank has the sum of `num_bytes` of each."""
    return 2 * gather_bytes(num_bytes, num_ranks)


def zero_bytes(parameters: float, trained: float, stage: int, num_ranks: int, num_micro_batches: int) -> float:
    """Bytes of gradients and parameters that a rank sends in a step.

    Stage 0 sums all gradients once. Stage 1 does the same and gathers the parameters that each rank has updated. Stage
    2 sums after every micro-batch, as no rank keeps whole gradients. Stage 3 gathers the parameters for every pass, for
    the features of several micro-batches too, and scatters the sums; the backward pass of a model with fewer than
    `KEPT_PARAMETERS` still has them from the forward pass.
    """
    size = FLOAT_BYTES * trained
    whole_sum, gather = sum_bytes(size, num_ranks), gather_bytes(size, num_ranks)
    if stage == 0:
        return whole_sum
    if stage == 1:
        return whole_sum + gather
    if stage == 2:
        return num_micro_batches * whole_sum + gather
    # Frozen parameters are spread too.
    whole = gather_bytes(FLOAT_BYTES * parameters, num_ranks)
    return num_micro_batches * gather + _passes_that_gather(parameters, num_micro_batches) * whole


def zero_calls(parameters: float, trained: float, stage: int, num_micro_batches: int) -> int:
    """Collectives for gradients and parameters in a step, each of which has its latency.

    A sum for each bucket, a larger one without ZeRO; stages 1 and 2 gather once, stage 3 fetches ahead for every pass.
    """
    buckets = ceil(trained / BUCKET_ELEMENTS)
    if stage == 0:
        return ceil(trained / _STAGE_0_ELEMENTS)
    if stage < 3:
        return (num_micro_batches if stage == 2 else 1) * buckets + 1
    fetched = ceil(parameters / _FETCHED_ELEMENTS)
    return num_micro_batches * buckets + _passes_that_gather(parameters, num_micro_batches) * fetched


def _passes_that_gather(parameters: float, num_micro_batches: int) -> int:
    """Of stage 3 in a step: forward, backward where it does not find them there, and the features of several."""
    passes = (1 if parameters < KEPT_PARAMETERS else 2) + (1 if num_micro_batches > 1 else 0)
    return passes * num_micro_batches


def feature_bytes(global_batch: int, projection_size: int, num_ranks: int) -> float:
    """Bytes that a rank sends so that VTC sees the global batch: two features and three integers of a sample."""
    return gather_bytes(global_batch * (2 * projection_size * FLOAT_BYTES + 3 * 8), num_ranks)


def seconds(traffic: Traffic, links: Links, num_ranks: int, num_nodes: int) -> tuple[float, float]:
    """Seconds of a step for gradients and for features; no collective is hidden behind another work.

    DeepSpeed overlaps none with stages 0 to 2 by default; stage 3 fetches ahead, and is a little faster than this.
    """
    if num_ranks == 1:
        return 0.0, 0.0
    per_s = links.slowest_per_s(num_nodes)
    call_s = (1 + log2(num_nodes)) * links.latency_s
    return (
        traffic.gradient_bytes / per_s + traffic.gradient_calls * call_s,
        traffic.feature_bytes / per_s + traffic.feature_calls * call_s,
    )
