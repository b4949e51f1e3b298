import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.seeds import Draws

counts = st.integers(1, 64)


@given(num_stored=counts, num_frames=st.integers(1, 16), seed=st.integers(0, 1000))
def test_head_and_tail_are_distinct_and_from_their_halves(num_stored, num_frames, seed):
    chosen = choose_frames(num_stored, num_frames, "headtail", Draws(seed))
    assert len(chosen) == num_frames
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < num_stored
    if num_stored < num_frames:
        return
    assert len(set(chosen)) == num_frames
    in_head = sum(frame < num_stored // 2 for frame in chosen)
    # A half that is too small for its share gives all it has.
    assert in_head == min((num_frames + 1) // 2, num_stored // 2)


@given(num_stored=counts, num_frames=st.integers(1, 16))
def test_uniform_takes_the_middles_of_equal_parts(num_stored, num_frames):
    chosen = choose_frames(num_stored, num_frames, "uniform", Draws(0))
    exact = [(2 * frame + 1) * num_stored // (2 * num_frames) for frame in range(num_frames)]
    assert chosen == exact
    # Reversed in time the middles are the same parts, up to the rounding down.
    assert max(abs(one + other - (num_stored - 1)) for one, other in zip(chosen, chosen[::-1], strict=True)) <= 1


@pytest.mark.parametrize(
    ("num_stored", "num_frames", "expected"),
    [(1, 4, [0, 0, 0, 0]), (3, 4, [0, 1, 1, 2]), (2, 4, [0, 0, 1, 1]), (3, 8, [0, 0, 0, 1, 1, 2, 2, 2])],
)
def test_short_clips_repeat_frames_in_both_policies(num_stored, num_frames, expected):
    for policy in ("headtail", "uniform"):
        assert choose_frames(num_stored, num_frames, policy, Draws(1)) == expected


def test_uniform_reaches_the_end():
    """The authors' code takes the first 16 of 30 frames."""
    assert choose_frames(30, 16, "uniform", Draws(0)) == [
        *(0, 2, 4, 6, 8, 10, 12, 14, 15, 17, 19, 21, 23, 25, 27, 29),
    ]


@pytest.mark.parametrize("num_stored", [4, 5, 7, 20])
def test_head_and_tail_draw_every_frame_of_a_half_equally_often(num_stored):
    num_draws = 3000
    chosen = [choose_frames(num_stored, 4, "headtail", Draws("f", number)) for number in range(num_draws)]
    seen = np.bincount(np.concatenate(chosen), minlength=num_stored) / num_draws
    half = num_stored // 2
    expected = np.where(np.arange(num_stored) < half, 2 / half, 2 / (num_stored - half))
    assert np.abs(seen - expected).max() < 0.05


def test_the_choice_belongs_to_its_draws():
    first, again = (choose_frames(40, 4, "headtail", Draws(1)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, choose_frames(40, 4, "headtail", Draws(2)))


def test_random_frames_are_any_of_the_clip_each_once_and_in_order():
    chosen = [choose_frames(10, 4, "random", Draws("f", number)) for number in range(400)]
    assert all(frames == sorted(set(frames)) and len(frames) == 4 for frames in chosen)
    counts = np.bincount(np.concatenate(chosen), minlength=10)
    assert len(counts) == 10
    assert abs(counts - 160).max() < 5 * (400 * 0.4 * 0.6) ** 0.5
    # Unlike headtail, all may come from one half.
    assert any(frames[-1] < 5 for frames in chosen)
    assert choose_frames(3, 4, "random", Draws(1)) == choose_frames(3, 4, "uniform", Draws(1))
