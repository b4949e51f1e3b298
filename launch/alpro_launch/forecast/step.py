"""The time of a step, part by part, and what holds it up.

What is assumed: the trainer's parts follow each other; the prompter computes on the same GPU (or cores), so its time
comes on top and none of it is hidden; decoding and reading go on beside all that, so a step takes the longest of
trainer, decoding and reading. On a machine whose cores both train and decode, decoding takes its share of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from alpro_launch.forecast.collectives import Traffic, feature_bytes, seconds, zero_bytes, zero_calls
from alpro_launch.forecast.devices import CONTEXT_BYTES
from alpro_launch.forecast.facts import Facts
from alpro_launch.forecast.machine import Machine
from alpro_launch.forecast.memory import Memory, memory_of
from alpro_launch.forecast.work import RunWork
from alpro_launch.restart import allowed_ranks
from alpro_stream.errors import ConfigError
from alpro_stream.manifest import Kind
from alpro_stream.model.operations import step_operations
from alpro_stream.run import RunConfig

DECODING, SHARED_DECODING, READING, REST = "decoding", "decoding on the same cores", "reading", "rest"
"""Names of parts."""
# Facts of a batch, two features, counts, and three words that ranks give each other between steps.
_NUM_COLLECTIVES = 7


@dataclass(frozen=True, slots=True)
class Layout:
    """How a step is cut.

    Attributes:
        num_ranks: GPUs of all nodes.
        ranks_per_node: GPUs of a full node.
        global_batch: samples of a step.
        num_micro_batches: of a rank.
    """

    num_ranks: int
    ranks_per_node: int
    global_batch: int
    num_micro_batches: int

    @property
    def num_nodes(self) -> int:
        """Nodes, the last of which may not be full."""
        return ceil(self.num_ranks / self.ranks_per_node)

    @property
    def rank_batch(self) -> float:
        """Samples of a rank."""
        return self.global_batch / self.num_ranks

    @property
    def micro_batch(self) -> float:
        """Samples that a rank computes at a time."""
        return self.rank_batch / self.num_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class StepForecast:
    """A step of a run; seconds but where it says otherwise.

    Attributes:
        layout: how it is cut.
        parts: of the trainer, one after the other.
        beside: what goes on at the same time: decoding and reading, as far as they are known.
        step_s: the longest of these.
        operations: of a rank, as the method counts them.
        flops: of a rank, executed.
        utilisation: operations over the peak (MFU); None where that is not known.
        traffic: what a rank sends.
        memory: of a GPU.
        waits_for_calls: whether the GPU waits for operations to be started.
    """

    layout: Layout
    parts: Mapping[str, float]
    beside: Mapping[str, float]
    step_s: float
    operations: float
    flops: float
    utilisation: float | None
    traffic: Traffic
    memory: Memory
    waits_for_calls: bool

    @property
    def clips_per_s(self) -> float:
        """Of all ranks."""
        return self.layout.global_batch / self.step_s

    @property
    def trainer_s(self) -> float:
        """Of all its parts."""
        return sum(self.parts.values())


def layout_of(config: RunConfig, num_nodes: int, ranks_per_node: int) -> Layout:
    """How the run is cut for so many GPUs.

    Raises:
        ConfigError: such a run cannot be trained by so many ranks.
    """
    if num_nodes < 1 or ranks_per_node < 1:
        raise ConfigError(f"--nodes {num_nodes} --gpus {ranks_per_node}: at least 1 of each is needed")
    stream, engine = config.stream, config.train.engine
    if stream.global_batch % stream.num_lanes:
        raise ConfigError(
            f"stream.global_batch {stream.global_batch} is not a multiple of stream.num_lanes {stream.num_lanes}; use "
            f"for example {max(1, stream.global_batch // stream.num_lanes) * stream.num_lanes}"
        )
    num_ranks = num_nodes * ranks_per_node
    allowed = allowed_ranks(stream.num_lanes, engine.num_micro_batches)
    if num_ranks not in allowed:
        numbers = ", ".join(map(str, allowed)) or "none"
        raise ConfigError(
            f"{num_nodes} x {ranks_per_node} GPUs are {num_ranks} ranks, which do not divide {stream.num_lanes} lanes "
            f"in {engine.num_micro_batches} micro-batches; allowed: {numbers}. Take another number, or set "
            "stream.num_lanes, train.engine.num_micro_batches or stream.global_batch"
        )
    return Layout(num_ranks, ranks_per_node, stream.global_batch, engine.num_micro_batches)


def sample_operations(config: RunConfig, facts: Facts, kind: Kind) -> float:
    """Floating point operations of a sample, as the method counts them and as `metrics.jsonl` has them."""
    return step_operations(
        config.task,
        config.model,
        config.stream.text.num_tokens,
        vocab_size=facts.sizes.vocab_size,
        num_entities=facts.sizes.num_entities,
        num_answers=facts.sizes.num_answers,
        is_image=kind == "image",
        frozen=config.frozen,
    )


def forecast_step(
    config: RunConfig,
    facts: Facts,
    work: RunWork,
    machine: Machine,
    layout: Layout,
    storage_per_s: float | None = None,
) -> StepForecast:
    """The time of a step and its parts, on average over the kinds of batches that a run has.

    Args:
        config: of the run.
        facts: of its sizes and data.
        work: that it computes.
        machine: that every rank works on.
        layout: how a step is cut.
        storage_per_s: bytes a second that storage gives to all nodes together; None where that is not known.

    Raises:
        ConfigError: several ranks on a machine whose links are not known.
    """
    parts: dict[str, float] = {}
    flops = operations = 0.0
    waits = []
    for kind, share in facts.data.kinds.items():
        found = _computing(config, work, machine, layout, kind)
        for name, (spent, executed, waiting) in found.items():
            parts[name] = parts.get(name, 0.0) + share * spent
            flops += share * executed
            waits += [waiting] if name == "forward" else []
        operations += share * layout.rank_batch * sample_operations(config, facts, kind)
    parts["update"] = _update_s(config, work, machine, layout)
    traffic = _traffic(config, work, layout)
    parts["gradients between ranks"], parts["features between ranks"] = _exchange_s(traffic, machine, layout)
    parts[REST] = machine.rest_s
    parts |= _decoding_between(config, facts, machine, layout)
    beside = _beside(config, facts, machine, layout, storage_per_s)
    step_s = max([sum(parts.values()), *beside.values()])
    peak = machine.peak_per_s
    return StepForecast(
        layout=layout,
        parts=parts,
        beside=beside,
        step_s=step_s,
        operations=operations,
        flops=flops,
        utilisation=operations / step_s / peak if peak else None,
        traffic=traffic,
        memory=_memory(config, facts, work, machine, layout),
        waits_for_calls=all(waits),
    )


def _computing(
    config: RunConfig, work: RunWork, machine: Machine, layout: Layout, kind: Kind
) -> dict[str, tuple[float, float, bool]]:
    """Seconds and operations of each part that computes, and whether it waits for its operations to be started."""
    micro, width, times = work.of(kind, layout.micro_batch), config.model.video.width, layout.num_micro_batches
    parts = {
        # Where several micro-batches are to see the features of all.
        "features first": micro.features * (times if times > 1 else 0),
        "forward": micro.forward * times,
        "backward": micro.backward * times,
        # Of the whole batch of a rank at once.
        "labels": work.of(kind, layout.rank_batch).labels,
    }
    found = {}
    for name, part in parts.items():
        rates = machine.label_rates if name == "labels" else machine.rates
        if part.calls:
            found[name] = (rates.seconds(part, width), part.flops, rates.waits_for_calls(part, width))
    return found


def _update_s(config: RunConfig, work: RunWork, machine: Machine, layout: Layout) -> float:
    stage = config.train.engine.zero_stage
    spread = layout.num_ranks if stage else 1
    # One rank without ZeRO sends nothing, and so copies nothing.
    gradients = work.trained * machine.gradient_s if stage or layout.num_ranks > 1 else 0.0
    gradients *= layout.num_micro_batches if stage >= 2 else 1  # No rank keeps whole gradients for the next one.
    return gradients + work.trained / spread * machine.update_s + work.num_tensors * machine.update_tensor_s


def _traffic(config: RunConfig, work: RunWork, layout: Layout) -> Traffic:
    stage, num_ranks, times = config.train.engine.zero_stage, layout.num_ranks, layout.num_micro_batches
    gradients = zero_bytes(work.parameters, work.trained, stage, num_ranks, times)
    calls = zero_calls(work.parameters, work.trained, stage, times)
    # Question answering looks at each question by itself.
    contrasts = config.task != "question_answering"
    features = feature_bytes(layout.global_batch, config.model.projection_size, num_ranks) if contrasts else 0.0
    return Traffic(gradients, calls, features, _NUM_COLLECTIVES)


def _exchange_s(traffic: Traffic, machine: Machine, layout: Layout) -> tuple[float, float]:
    if layout.num_ranks == 1:
        return 0.0, 0.0
    if machine.links is None:
        raise ConfigError(
            f"{layout.num_ranks} ranks exchange gradients, and no file says how fast on this machine: give the results "
            "of `alpro bench forecast --json FILE`, or forecast one rank"
        )
    return seconds(traffic, machine.links, layout.num_ranks, layout.num_nodes)


def _decoding_between(config: RunConfig, facts: Facts, machine: Machine, layout: Layout) -> dict[str, float]:
    """What decoding takes from the trainer: all of it without workers, and its share of cores that do both."""
    if machine.decode_s is None:
        return {}
    decode = config.stream.decode
    spent = layout.rank_batch * machine.decode_s
    if not decode.num_workers:
        # Whole videos are decoded by processes all the same, for which the trainer waits then.
        by_processes = facts.data.stores_videos and decode.device == "cpu"
        return {DECODING: spent / (decode.num_processes if by_processes else 1)}
    return {SHARED_DECODING: spent / machine.cores_per_rank} if machine.shares_cores else {}


def _beside(
    config: RunConfig, facts: Facts, machine: Machine, layout: Layout, storage_per_s: float | None
) -> dict[str, float]:
    beside = {}
    decode = config.stream.decode
    workers = decode.num_processes if facts.data.stores_videos else decode.num_workers
    if decode.device == "mixed":
        workers = 1  # The GPU of the rank.
    if machine.decode_s is not None and decode.num_workers:
        beside[DECODING] = layout.rank_batch * machine.decode_s / workers
    if storage_per_s and facts.data.clip_bytes:
        beside[READING] = layout.global_batch * facts.data.clip_bytes / storage_per_s
    return beside


def _memory(config: RunConfig, facts: Facts, work: RunWork, machine: Machine, layout: Layout) -> Memory:
    decode = config.stream.decode
    saved = max(work.of(kind, layout.micro_batch).saved_bytes for kind in facts.data.kinds)
    return memory_of(
        parameters=work.parameters,
        trained=work.trained,
        zero_stage=config.train.engine.zero_stage,
        num_ranks=layout.num_ranks,
        activations=saved,
        prompter_parameters=work.prompter_parameters,
        decoder_bytes=decode.device_memory_mb * 2.0**20 if decode.device == "mixed" else 0.0,
        context_bytes=0.0 if machine.memory_bytes is None else CONTEXT_BYTES,
    )
