"""Which of a clip's stored frames a step takes."""

from typing import Literal

from alpro_stream.stream.seeds import Draws

FramePolicy = Literal["headtail", "random", "uniform"]


def choose_frames(num_stored: int, num_frames: int, policy: FramePolicy, draws: Draws) -> list[int]:
    """Indices of `num_frames` stored frames, ascending.

    `headtail` (pre-training, section 4.1 of the paper and its code) draws half of the frames without
    replacement from each half of the clip; with an odd number the first half gives one more. `random`
    (fine-tuning, as in its code) draws all of them without replacement from the whole clip. `uniform`
    (evaluation) takes the middles of equal parts. A clip that stores too few frames gives
    ``floor((i + 0.5) * num_stored / num_frames)`` in all, so some repeat.
    """
    if policy == "uniform" or num_stored < num_frames:
        return [(2 * frame + 1) * num_stored // (2 * num_frames) for frame in range(num_frames)]
    if policy == "random":
        return draws.distinct(num_frames, num_stored)
    head = (num_frames + 1) // 2
    # The halves need not hold as many frames as are drawn from them: 5 of 5 frames are 3 + 2.
    middle = min(max(num_stored // 2, head), num_stored - (num_frames - head))
    first = draws.distinct(head, middle)
    last = draws.distinct(num_frames - head, num_stored - middle)
    return [*first, *(middle + frame for frame in last)]
