import numpy as np
import pytest

from alpro_stream.stream.seeds import Draws


def test_golden_words():
    """Committed numbers: if these change, every order and every augmentation of stored runs changes."""
    assert Draws(42, "crop", "video", 0, "clip-1").words(3).tolist() == GOLDEN_WORDS
    assert Draws("shards", 0, "video", 0).permutation(8).tolist() == GOLDEN_PERMUTATION
    assert Draws(0).uniform(2).tolist() == GOLDEN_UNIFORM


def test_equal_identities_draw_the_same_and_go_on():
    first, second = Draws(1, "a"), Draws(1, "a")
    assert np.array_equal(first.words(5), second.words(5))
    assert not np.array_equal(first.words(5), Draws(1, "a").words(5))


def test_shorter_draws_are_the_beginning_of_longer_ones():
    assert np.array_equal(Draws(3).uniform(4, 3), Draws(3).uniform(9, 3)[:4])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), ("1",)),
        ((1, 2), (2, 1)),
        ((1, 23), (12, 3)),
        (("a", "b"), ("ab",)),
        (("a,b",), ("a", "b")),
        (('a", "b',), ("a", "b")),
        (("a\x1fint:3",), ("a", 3)),
        ((1,), (1, "")),
        ((True,), (1,)),
        ((-1,), (1,)),
        (("ä",), ("a",)),
    ],
)
def test_identities_do_not_collide(one, other):
    assert not np.array_equal(Draws(*one).words(2), Draws(*other).words(2))


@pytest.mark.parametrize("part", [np.int64(1), b"a", np.float32(1)])
def test_other_types_are_refused(part):
    """They would silently name another stream than the equal Python number."""
    with pytest.raises(TypeError):
        Draws(part)


def test_uniform_is_uniform():
    values = Draws("uniform").uniform(200, 500)
    assert values.shape == (200, 500)
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    # 100,000 draws in 20 bins: a bin's standard deviation is 69.
    assert np.abs(counts - 5000).max() < 5 * 69
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.2


def test_exponential_has_rate_one():
    values = Draws("exponential").exponential(100_000)
    assert values.min() >= 0
    assert abs(values.mean() - 1) < 0.02
    assert abs((values > 1).mean() - np.exp(-1)) < 0.01


def test_integers_cover_their_range_evenly():
    counts = np.bincount([Draws("integer", number).integer(5) for number in range(5000)], minlength=5)
    assert len(counts) == 5
    # Standard deviation of a count: 28.
    assert np.abs(counts - 1000).max() < 5 * 28
    assert Draws("one").integer(1) == 0


def test_permutations_are_permutations_and_uniform():
    assert sorted(Draws("p").permutation(1000)) == list(range(1000))
    assert Draws("p").permutation(0).shape == (0,)
    seen = [tuple(Draws("p", number).permutation(3)) for number in range(3000)]
    counts = [seen.count(order) for order in sorted(set(seen))]
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts) < 5 * 21


GOLDEN_WORDS = [16656637528505931563, 18096696138782775353, 12534511391957309505]
GOLDEN_PERMUTATION = [5, 2, 4, 1, 7, 3, 6, 0]
GOLDEN_UNIFORM = [0.949472046185394, 0.13988548611354656]
