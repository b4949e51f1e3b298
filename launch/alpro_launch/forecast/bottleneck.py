"""One sentence: what a forecast step spends most on, and what to change."""

from alpro_launch.forecast.collectives import zero_bytes
from alpro_launch.forecast.step import DECODING, READING, REST, SHARED_DECODING, Layout, StepForecast
from alpro_stream.run import RunConfig

_NOTABLE_DATA = 1.05
_NOTABLE = 0.2
"""Share of a step from which a part beside the model is worth a change."""
_STORE_FRAMES = "store frames (payload=frames of alpro shard), or decode on the GPU with stream.decode.device=mixed"


def bottleneck(step: StepForecast, config: RunConfig, stores_videos: bool = False) -> str:
    """What holds the step up.

    Args:
        step: of the run.
        config: of the run.
        stores_videos: whether whole videos are decoded.
    """
    if step.beside:
        slowest, spent = max(step.beside.items(), key=lambda item: item[1])
        if spent > _NOTABLE_DATA * step.trainer_s:
            longer = f"{slowest} takes {spent / step.trainer_s:.1f} times as long as the trainer"
            return f"bottleneck: {longer}: {_beside_remedy(slowest, config, stores_videos)}"
    shares = {name: spent / step.trainer_s for name, spent in step.parts.items()}
    model = sum(shares.get(name, 0.0) for name in ("features first", "forward", "backward"))
    # What a setting may change, by its share of the step; the model itself only if nothing else is worth a change.
    found = {
        _exchange(step.layout, config): shares["gradients between ranks"] + shares["features between ranks"],
        _labels(config): shares.get("labels", 0.0),
        _update(config): shares["update"],
        _DECODING: shares.get(DECODING, 0.0),
        _SHARED: shares.get(SHARED_DECODING, 0.0),
        _REST: shares[REST],
        _CALLS: model if step.waits_for_calls else 0.0,
    }
    (what, remedy), share = max(found.items(), key=lambda item: item[1])
    if share < _NOTABLE:
        (what, remedy), share = _model(config), model
    return f"bottleneck: {what} ({100 * share:.0f} % of the step): {remedy}"


_CALLS = (
    "starting operations, which takes longer than computing them",
    "give a rank more samples at a time (fewer GPUs or micro-batches), or set train.engine.compile=true",
)
_DECODING = (
    "decoding, for which the trainer waits",
    "set stream.decode.num_workers=2, so that it goes on beside the step",
)
_SHARED = (
    "decoding on the cores that train",
    "take more cores for a rank, or store frames at the size at which they are cropped",
)
_REST = (
    "what the trainer does beside its parts",
    "a larger stream.global_batch spreads it over more samples",
)


def _beside_remedy(slowest: str, config: RunConfig, stores_videos: bool) -> str:
    if slowest == READING:
        return "put the shards on faster storage, such as disks of the nodes"
    if config.stream.decode.device == "mixed":
        return "decode on cores (stream.decode.device=cpu), store smaller frames, or take more GPUs"
    if stores_videos:
        return f"raise stream.decode.num_processes, {_STORE_FRAMES}"
    return "raise stream.decode.num_workers, or decode on the GPU with stream.decode.device=mixed"


def _exchange(layout: Layout, config: RunConfig) -> tuple[str, str]:
    engine = config.train.engine
    sent = [zero_bytes(1.0, 1.0, stage, layout.num_ranks, engine.num_micro_batches) for stage in range(4)]
    least = sent.index(min(sent))
    if sent[least] < sent[engine.zero_stage]:
        less = 100 * (1 - sent[least] / sent[engine.zero_stage])
        remedy = f"set train.engine.zero_stage={least}, which sends {less:.0f} % less, if the memory allows it"
    else:
        remedy = "take fewer nodes or a faster network, or a larger stream.global_batch, so that a rank computes more"
    return "the links between ranks", remedy


def _labels(config: RunConfig) -> tuple[str, str]:
    prompter = config.prompter
    is_fast = prompter is None or (prompter.precision == "bf16" and prompter.compile)
    if is_fast or config.train.engine.precision == "fp32":
        return "the prompter, beside the model", "a smaller prompter would be faster"
    return "the prompter, beside the model", "set prompter.precision=bf16 and prompter.compile=true"


def _update(config: RunConfig) -> tuple[str, str]:
    if config.train.engine.zero_stage == 0:
        return "the optimizer", "set train.engine.zero_stage=1, which spreads it over the ranks"
    return "the optimizer", "a larger stream.global_batch makes fewer updates"


def _model(config: RunConfig) -> tuple[str, str]:
    engine = config.train.engine
    if engine.activation_checkpointing:
        remedy = "turn activation_checkpointing off if the memory allows it, or take more GPUs"
    elif engine.num_micro_batches > 1:
        remedy = "more GPUs need fewer micro-batches, whose features are computed twice"
    elif engine.precision == "fp32":
        remedy = "train.engine.precision=bf16 on a GPU, or more GPUs"
    elif not engine.compile:
        remedy = "train.engine.compile=true, or more GPUs"
    else:
        remedy = "more or faster GPUs"
    return "the model", remedy
