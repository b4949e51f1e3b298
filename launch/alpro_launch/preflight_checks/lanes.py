"""Whether a run can be trained by so many ranks, and what that makes of a pass."""

from alpro_launch.preflight_checks.lines import Line, counted
from alpro_launch.restart import allowed_ranks
from alpro_stream.stream.plan import Plan


def judge_lanes(world_size: int, num_lanes: int, num_micro_batches: int) -> list[Line]:
    """One line; a run that does not fit is refused with the numbers that would."""
    allowed = allowed_ranks(num_lanes, num_micro_batches)
    in_parts = f" in {num_micro_batches} micro-batches" if num_micro_batches > 1 else ""
    numbers = ", ".join(map(str, allowed)) or "none"
    against = f"{num_lanes} lanes{in_parts}; allowed numbers of ranks: {numbers}"
    if world_size in allowed:
        each = counted(num_lanes // world_size, "lane")
        return [Line("lanes", f"{counted(world_size, 'rank')} with {each} each{in_parts}", against)]
    remedies = []
    if allowed:
        remedies.append(f"use {counted(max(size for size in allowed if size <= world_size), 'rank')}")
    if num_lanes % world_size == 0:
        lanes = num_lanes // world_size
        fitting = [number for number in range(1, lanes + 1) if lanes % number == 0]
        remedies.append(f"set train.engine.num_micro_batches to one of {', '.join(map(str, fitting))}")
    remedies.append("for a new run set another stream.num_lanes")
    return [Line("lanes", counted(world_size, "rank"), against, "FAIL", ", or ".join(remedies))]


def describe_plan(plan: Plan) -> str:
    """What a pass of each source is, and an epoch."""
    global_batch = plan.num_lanes * plan.lane_batch
    passes = [
        f"{source.name}: {source.num_samples} samples, {counted(steps, 'step')} a pass, {left_over} left over"
        for source, steps, left_over in zip(plan.sources, plan.steps_per_pass, plan.left_over, strict=True)
    ]
    samples = global_batch * plan.steps_per_epoch
    return f"{'; '.join(passes)}; an epoch is {counted(plan.steps_per_epoch, 'step')}, {samples} samples"
