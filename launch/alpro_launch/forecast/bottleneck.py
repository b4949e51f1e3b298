"""One sentence: what a forecast step spends most on, and what to change."""

from alpro_launch.forecast.step import StepForecast
from alpro_stream.run import RunConfig

_NOTABLE_DATA = 1.05
_NOTABLE = 0.2
"""Share of a step from which a part is worth a change."""


def bottleneck(step: StepForecast, config: RunConfig) -> str:
    """What holds the step up.

    Args:
        step: of the run.
        config: of the run.
    """
    if step.beside:
        slowest, spent = max(step.beside.items(), key=lambda item: item[1])
        if spent > _NOTABLE_DATA * step.trainer_s:
            return (
                f"bottleneck: {slowest} takes {spent / step.trainer_s:.1f} times as long as the trainer: "
                + (_DATA_REMEDIES[slowest])
            )
    shares = {name: spent / step.trainer_s for name, spent in step.parts.items()}
    exchange = shares["gradients between ranks"] + shares["features between ranks"]
    if exchange >= _NOTABLE:
        return f"bottleneck: the links between ranks ({_percent(exchange)} of the step): {_exchange_remedy(config)}"
    if step.waits_for_calls:
        return (
            "bottleneck: starting operations, which takes longer than computing them: give a rank more samples at a "
            "time (fewer GPUs or micro-batches), or set train.engine.compile=true"
        )
    if shares.get("labels", 0.0) >= _NOTABLE and config.prompter is not None:
        return f"bottleneck: the model, and the prompter beside it ({_percent(shares['labels'])}): " + (
            "a smaller prompter would be faster"
            if config.prompter.precision == "bf16" or config.train.engine.precision == "fp32"
            else "set prompter.precision=bf16 and prompter.compile=true"
        )
    if shares["update"] >= _NOTABLE:
        return f"bottleneck: the optimizer ({_percent(shares['update'])}): {_update_remedy(config)}"
    model = sum(shares.get(name, 0.0) for name in ("features first", "forward", "backward"))
    return f"bottleneck: the model ({_percent(model)} of the step): {_model_remedy(config)}"


_DATA_REMEDIES = {
    "decoding": "raise stream.decode.num_workers, or decode on the GPU with stream.decode.device=mixed",
    "reading": "put the shards on faster storage, such as disks of the nodes",
}


def _exchange_remedy(config: RunConfig) -> str:
    stage, times = config.train.engine.zero_stage, config.train.engine.num_micro_batches
    if stage == 3 or (stage == 2 and times > 1):
        return "set train.engine.zero_stage=1, which sends less, if the memory allows it"
    return "take fewer nodes or a faster network, or a larger stream.global_batch, so that a rank computes more between"


def _update_remedy(config: RunConfig) -> str:
    if config.train.engine.zero_stage == 0:
        return "set train.engine.zero_stage=1, which spreads it over the ranks"
    return "a larger stream.global_batch makes fewer updates"


def _model_remedy(config: RunConfig) -> str:
    engine = config.train.engine
    if engine.activation_checkpointing:
        return "turn activation_checkpointing off if the memory allows it, or take more GPUs"
    if engine.num_micro_batches > 1:
        return "more GPUs need fewer micro-batches, whose features are computed twice"
    if engine.precision == "fp32":
        return "train.engine.precision=bf16 on a GPU, or more GPUs"
    if not engine.compile:
        return "train.engine.compile=true, or more GPUs"
    return "more or faster GPUs"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
