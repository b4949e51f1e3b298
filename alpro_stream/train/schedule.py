"""The learning rate as a function of the step."""


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then linear decay to 0 (paper, appendix; the published pre-training).

    Args:
        step: update about to be made, counted from 1.
        num_steps: updates of the whole run.
        peak: rate at the end of the warm-up.
        warmup_ratio: share of the run that is warm-up.
    """
    warmup = int(warmup_ratio * num_steps)
    if step < warmup:
        return peak * step / warmup
    # The published floor: the last update is not wasted on a rate of exactly 0.
    return max(peak * (num_steps - step) / max(1, num_steps - warmup), 1e-8)
