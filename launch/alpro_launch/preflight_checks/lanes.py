"""Whether the ranks divide the lanes, and what that makes of a pass."""

from alpro_launch.preflight_checks.lines import Line, counted
from alpro_stream.stream.plan import Plan


def judge_lanes(world_size: int, num_lanes: int, num_micro_batches: int) -> list[Line]:
    """One line; a run that does not fit is refused with the numbers that would."""
    allowed = [size for size in range(1, num_lanes + 1) if num_lanes % size == 0]
    against = f"{num_lanes} lanes; allowed numbers of ranks: {', '.join(map(str, allowed))}"
    if num_lanes % world_size:
        fewer = max(size for size in allowed if size <= world_size)
        remedy = f"use {counted(fewer, 'rank')}, or for a new run another stream.num_lanes"
        return [Line("lanes", counted(world_size, "rank"), against, "FAIL", remedy)]
    lanes = num_lanes // world_size
    parts = f"{num_micro_batches} parts" if num_micro_batches > 1 else "one part"
    text = f"{counted(world_size, 'rank')} with {counted(lanes, 'lane')} each, computed in {parts}"
    if lanes % num_micro_batches:
        divisors = [number for number in range(1, lanes + 1) if lanes % number == 0]
        remedy = f"set train.engine.num_micro_batches to one of {', '.join(map(str, divisors))}: lanes are never split"
        return [Line("lanes", text, against, "FAIL", remedy)]
    return [Line("lanes", text, against)]


def describe_plan(plan: Plan) -> str:
    """What a pass of each source is, and an epoch."""
    global_batch = plan.num_lanes * plan.lane_batch
    passes = [
        f"{source.name}: {source.num_samples} samples, {counted(steps, 'step')} a pass, {left_over} left over"
        for source, steps, left_over in zip(plan.sources, plan.steps_per_pass, plan.left_over, strict=True)
    ]
    samples = global_batch * plan.steps_per_epoch
    return f"{'; '.join(passes)}; an epoch is {counted(plan.steps_per_epoch, 'step')}, {samples} samples"
