from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.media.grid import Thinning, as_written, is_on_grid, spread, thinned


def shown_at(times, end, grid_time):
    """Slow definition: the last frame whose time is not after the grid time."""
    return max((i for i, t in enumerate(times) if t <= grid_time), default=None) if grid_time < end else None


@given(
    gaps=st.lists(st.fractions(min_value=Fraction(1, 100), max_value=2, max_denominator=100), min_size=1, max_size=30),
    fps=st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(3), Fraction(2997, 100)]),
)
def test_the_stored_frames_are_those_on_display_at_grid_times(gaps, fps):
    times = [sum(gaps[:i], Fraction(0)) for i in range(len(gaps))]
    end = sum(gaps, Fraction(0))
    expected = {shown_at(times, end, k / fps) for k in range(int(end * fps) + 2)} - {None}
    bounds = [*times, end]
    assert {i for i in range(len(times)) if is_on_grid(bounds[i], bounds[i + 1], fps)} == expected


def test_a_frame_that_began_before_the_clip_is_the_clips_first():
    assert is_on_grid(Fraction(-5), Fraction(1, 10), Fraction(3))
    assert not is_on_grid(Fraction(-5), Fraction(0), Fraction(3))


def test_a_time_stamp_that_jumps_by_days_costs_nothing():
    assert is_on_grid(Fraction(1), Fraction(10**9), Fraction(30))


def test_rates_and_times_are_read_as_written():
    assert as_written(29.97) == Fraction(2997, 100)
    assert as_written(1 / 3) == Fraction(1, 3)


@pytest.mark.parametrize("limit", [1, 2, 5, 64])
@pytest.mark.parametrize("num_items", [0, 1, 2, 5, 63, 64, 65, 127, 128, 129, 1000, 5000])
def test_thinning_is_even_and_bounded(num_items, limit):
    thinning, most_held = Thinning(limit), 0
    for item in range(num_items):
        thinning.add(item) if thinning.wants_next() else thinning.skip()
        most_held = max(most_held, len(thinning._held))
    kept = thinning.result()
    assert most_held <= 2 * limit
    assert kept == thinned(num_items, limit)
    assert len(kept) == min(num_items, limit)
    if num_items <= limit:
        assert kept == list(range(num_items))
    elif limit > 1:
        gaps = [b - a for a, b in pairwise(kept)]
        assert kept[0] == 0
        assert num_items - 1 - kept[-1] <= num_items / limit
        assert max(gaps) <= 2 * min(gaps)


def test_spread_holds_both_ends():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 10) == [0, 1, 2]
    assert spread(9, 1) == [4]


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="expected 1 or more"):
        Thinning(0)
