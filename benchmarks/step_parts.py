"""Where the time of a step goes, and one sentence on what to change: pure functions of the rows of `end_to_end`."""

from collections.abc import Mapping, Sequence

from alpro_stream.stream.gauges import bottleneck
from benchmarks.charts import Bar

PARTS = ("forward", "backward", "update", "data wait", "prompter wait", "rest")
"""They add up to the step."""
STAGES = ("read", "decode", "text")
"""Of the loader, beside the step."""
NOTABLE = 0.05
"""Share of the step from which on something is worth a change."""

Values = Mapping[str, float]
"""Milliseconds by name of the row."""


def bars(values: Values, limits: Values) -> list[Bar]:
    """The parts in their order, each with its limit; for a chart."""
    return [Bar(name, max(0.0, values[name]), limits.get(name)) for name in PARTS]


def avoidable(values: Values, limits: Values) -> dict[str, float]:
    """Milliseconds of a step that each cause costs beyond what the hardware needs for the work.

    A wait and the rest are avoidable as a whole; forward and backward beyond the time of plain matrix products, the
    update beyond that of a copy in memory. Without a limit nothing of a part is known to be avoidable.
    """

    def beyond(names: Sequence[str]) -> float:
        return sum(max(0.0, values[name] - limits.get(name, values[name])) for name in names)

    return {
        "data wait": values["data wait"],
        "prompter wait": values["prompter wait"],
        "model": beyond(("forward", "backward")),
        "update": beyond(("update",)),
        "rest": max(0.0, values["rest"]),
    }


def advice(values: Values, limits: Values) -> str:
    """What costs a step most of what could be avoided, by which figures, and what to change.

    Args:
        values: of the rows `PARTS`, `step`, and `beside: ...` for each of `STAGES`.
        limits: of those rows that have one.
    """
    step = sum(values[name] for name in PARTS)
    costs = avoidable(values, limits)
    cause = max(costs, key=costs.__getitem__)
    computed = values["forward"] + values["backward"]
    fastest = limits.get("forward", 0.0) + limits.get("backward", 0.0)
    times = f", {computed / fastest:.1f} times as long as plain matrix products" if fastest else ""
    if costs[cause] < NOTABLE * step:
        return (
            f"nothing stands out: forward and backward are {_percent(computed, step)} of the step{times}; what is "
            "left to change is the device, or the number of ranks"
        )
    if cause in ("data wait", "prompter wait"):
        return bottleneck(_figures(values, step)).removeprefix("bottleneck: ")
    if cause == "model":
        return (
            f"forward and backward take {_percent(computed, step)} of the step{times}: give them larger products by "
            "more samples at a time (stream.global_batch, or fewer train.engine.num_micro_batches), on a GPU also "
            "train.engine.precision=bf16 and train.engine.compile=true"
        )
    if cause == "update":
        return (
            f"the optimizer's update takes {_percent(values['update'], step)} of the step, whatever the batch: make "
            "fewer of them for the same clips by a larger stream.global_batch, or share it among more ranks with "
            "train.engine.zero_stage=1"
        )
    return (
        f"{_percent(values['rest'], step)} of the step is outside of its parts (metrics, votes of the ranks, the "
        "loop itself): raise train.log_every, and see that nothing else runs on these cores"
    )


def _figures(values: Values, step: float) -> dict[str, float]:
    """As the trainer's metrics have them."""
    shares = {f"{what}_wait_percent": 100 * values[f"{what} wait"] / step for what in ("data", "prompter")}
    stages = {f"stream/{name}_percent": 100 * values[f"beside: {name}"] / step for name in STAGES}
    return shares | stages


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"
