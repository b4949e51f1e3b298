import hashlib
import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.stream.seeds import Draws, random_order, sample_keys, uniform_at

PURPOSES = ("mlm", "pem", "crop", "flip", "frames", "augment")
COLLIDING = [
    ((1,), ("1",)),
    ((1, 2), (2, 1)),
    ((1, 1), (2, 2)),
    ((1, 23), (12, 3)),
    (("a", "b"), ("ab",)),
    (("a,b",), ("a", "b")),
    (('a", "b',), ("a", "b")),
    (("a\x1fint:3",), ("a", 3)),
    ((1,), (1, "")),
    ((True,), (1,)),
    ((True, 2), (1, 2)),
    (("a", 2, True), ("a", 2, 1)),
    ((-1,), (1,)),
    (("ä",), ("a",)),
]


def test_golden_words():
    """Committed numbers: if these change, every order and every augmentation of stored runs changes."""
    assert Draws(42, "crop", "video", 0, "clip-1").words(3).tolist() == GOLDEN_WORDS
    assert random_order(8, "shards", 0, "video", 0).tolist() == GOLDEN_ORDER
    assert Draws(0).uniform(2).tolist() == GOLDEN_UNIFORM


def test_equal_identities_draw_the_same_and_go_on():
    first, second = Draws(1, "a"), Draws(1, "a")
    assert np.array_equal(first.words(5), second.words(5))
    assert not np.array_equal(first.words(5), Draws(1, "a").words(5))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 40])
def test_draws_are_those_of_the_key_however_they_are_asked_for(count):
    (expected,) = uniform_at(sample_keys([(7, "video", "ä")], "crop"), count + 1).tolist()
    by_number, at_once = Draws("crop", 7, "video", "ä"), Draws("crop", 7, "video", "ä")
    assert [by_number.scalar() for _ in range(count + 1)] == expected
    assert [*at_once.uniform(count).tolist(), at_once.scalar()] == expected


@given(st.lists(st.one_of(st.integers(), st.text(), st.booleans()), max_size=4))
def test_an_identity_is_named_by_its_json(identity):
    """By its published form, so that the numbers of a stored run stay."""
    key, purpose = (
        int.from_bytes(hashlib.blake2b(json.dumps(name).encode(), digest_size=8).digest(), "little")
        for name in (identity, ["crop"])
    )
    expected = mixed(key + mixed(purpose))
    assert sample_keys([tuple(identity)], "crop").tolist() == [expected]
    assert Draws("crop", *identity).uniform(1) == uniform_at(np.array([expected], dtype=np.uint64), 1)[0]


def mixed(word):
    """SplitMix64's function of 64 bits."""
    word %= 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_shorter_draws_are_the_beginning_of_longer_ones():
    assert np.array_equal(Draws(3).uniform(4, 3), Draws(3).uniform(9, 3)[:4])


@pytest.mark.parametrize(("one", "other"), COLLIDING)
def test_identities_do_not_collide(one, other):
    assert not np.array_equal(Draws(*one).words(2), Draws(*other).words(2))
    keys = sample_keys([one, other], "crop")
    assert keys[0] != keys[1]


@pytest.mark.parametrize("part", [np.int64(1), b"a", np.float32(1)])
def test_other_types_are_refused(part):
    """They would silently name another stream than the equal Python number."""
    with pytest.raises(TypeError):
        Draws(part)
    with pytest.raises(TypeError):
        sample_keys([("a", part)], "crop")


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


def test_distinct_numbers_are_every_set_equally_often():
    found = [tuple(Draws("d", number).distinct(2, 5)) for number in range(5000)]
    counts = Counter(found)
    assert len(counts) == 10
    assert all(0 <= low < high < 5 for low, high in counts)
    # Standard deviation of a count: 21.
    assert max(abs(count - 500) for count in counts.values()) < 5 * 21
    assert Draws("d").distinct(4, 4) == [0, 1, 2, 3]
    assert Draws("d").distinct(0, 4) == []


def test_orders_are_random_orders():
    assert sorted(random_order(1000, "p")) == list(range(1000))
    assert random_order(0, "p").shape == (0,)
    counts = Counter(tuple(random_order(3, "p", number).tolist()) for number in range(3000))
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts.values()) < 5 * 21


def test_permutations_are_permutations_and_uniform():
    assert sorted(Draws("p").permutation(1000)) == list(range(1000))
    assert Draws("p").permutation(0).shape == (0,)
    seen = [tuple(Draws("p", number).permutation(3)) for number in range(3000)]
    counts = [seen.count(order) for order in sorted(set(seen))]
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts) < 5 * 21


def test_golden_keys_and_numbers():
    """Committed numbers: if these change, what is hidden for MLM changes in every stored run."""
    keys = sample_keys([(42, "video", 0, "clip-1"), (42, "video", 0, "clip-2")], "mlm")
    assert keys.tolist() == GOLDEN_KEYS
    assert uniform_at(keys, 3).tolist() == GOLDEN_NUMBERS


def test_numbers_are_those_of_splitmix64():
    """The generator's published numbers for the seed 1234567, and for seed 0."""
    words = [
        [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
    ]
    expected = [[(word >> 11) / 2**53 for word in row] for row in words]
    assert uniform_at(np.array([1234567, 0], dtype=np.uint64), 5).tolist() == expected


def test_a_sample_has_its_numbers_whatever_the_count_and_the_companions():
    identities = [(7, "video", 0, f"clip-{number}") for number in range(50)]
    whole = uniform_at(sample_keys(identities, "mlm"), 90)
    assert whole.shape == (50, 90)
    assert np.array_equal(uniform_at(sample_keys(identities, "mlm"), 12), whole[:, :12])
    for number in (0, 17, 49):
        assert np.array_equal(uniform_at(sample_keys([identities[number]], "mlm"), 90)[0], whole[number])
    assert uniform_at(sample_keys([], "mlm"), 4).shape == (0, 4)


def test_two_purposes_share_no_numbers():
    identities = [(number,) for number in range(100)]
    keys = np.concatenate([sample_keys(identities, purpose) for purpose in ("mlm", "crop")])
    values = uniform_at(keys, 100)
    assert len(np.unique(keys)) == 200
    assert len(np.unique(values)) == values.size


def test_the_numbers_of_two_purposes_are_independent():
    """One digest names a sample for all purposes; only a constant tells them apart."""
    identities = [(42, "video", 0, f"clip-{number:06d}") for number in range(2000)]
    numbers = {purpose: uniform_at(sample_keys(identities, purpose), 100) for purpose in PURPOSES}
    for one, other in combinations(PURPOSES, 2):
        for shift in (0, 1, 2):
            pairs = numbers[one][:, : 100 - shift].ravel(), numbers[other][:, shift:].ravel()
            # 200,000 pairs: standard deviation 0.0022; of a cell of 2,000 about 45.
            assert abs(np.corrcoef(*pairs)[0, 1]) < 5 * 0.0022
            cells = np.histogram2d(*pairs, bins=10, range=[(0, 1), (0, 1)])[0]
            assert np.abs(cells - len(pairs[0]) / 100).max() < 5 * 45
    bits = (numbers["crop"] * 2.0**53).astype(np.int64) ^ (numbers["flip"] * 2.0**53).astype(np.int64)
    assert np.abs([(bits >> bit & 1).mean() - 0.5 for bit in range(53)]).max() < 5 * 0.0012


@pytest.fixture(scope="module")
def many_numbers():
    """A thousand numbers of each of a thousand samples whose names differ least."""
    return uniform_at(sample_keys([(42, "video", 0, f"clip-{number:06d}") for number in range(1000)], "mlm"), 1000)


def test_numbers_of_many_keys_are_uniform(many_numbers):
    assert many_numbers.min() >= 0
    assert many_numbers.max() < 1
    for values in (many_numbers, many_numbers[:, 0], many_numbers[:, 1], many_numbers[0], many_numbers[:, ::3]):
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        expected = values.size / 50
        # Chi-square with 49 degrees of freedom: mean 49, standard deviation 9.9.
        assert abs(((counts - expected) ** 2).sum() / expected - 49) < 5 * 9.9


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("distance", [1, 2, 3, 30])
def test_neighbours_are_not_correlated(many_numbers, axis, distance):
    """Neither the numbers of a sample among themselves, nor those of samples whose names are neighbours."""
    one, other = (np.take(many_numbers, part, axis) for part in (range(1000 - distance), range(distance, 1000)))
    # A correlation of n pairs has a standard deviation of 1 / sqrt(n): here 0.001.
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.005
    # Pairs fill the square evenly: 100 cells of about 10,000, standard deviation about 100.
    cells = np.histogram2d(one.ravel(), other.ravel(), bins=10, range=[(0, 1), (0, 1)])[0]
    assert np.abs(cells - one.size / 100).max() < 5 * 100


def test_every_bit_is_set_half_of_the_time_and_by_itself(many_numbers):
    words = (many_numbers * 2.0**53).astype(np.int64)
    bits = np.stack([(words >> bit & 1).ravel() for bit in range(53)]).astype(np.float32)
    # A million draws: the standard deviation of a share is 0.0005, of a correlation 0.001.
    assert np.abs(bits.mean(axis=1) - 0.5).max() < 5 * 0.0005
    correlations = np.corrcoef(bits) - np.eye(53)
    assert np.abs(correlations).max() < 0.006
    flips = (words[:, 1:] ^ words[:, :-1]).ravel()
    assert np.abs([(flips >> bit & 1).mean() - 0.5 for bit in range(53)]).max() < 5 * 0.0005


def test_one_bit_of_a_key_changes_half_of_the_bits():
    keys = sample_keys([(number,) for number in range(500)], "mlm")
    before = (uniform_at(keys, 4) * 2.0**53).astype(np.int64)
    for bit in range(64):
        after = (uniform_at(keys ^ np.uint64(1 << bit), 4) * 2.0**53).astype(np.int64)
        changed = np.unpackbits((before ^ after).view(np.uint8)).sum() / before.size
        # 2000 words of 53 bits: 26.5 of them change, standard deviation 3.64 / sqrt(2000).
        assert abs(changed - 26.5) < 5 * 3.64 / 2000**0.5


GOLDEN_WORDS = [3019664017315844195, 5802948577759140655, 1940144123350661771]
GOLDEN_ORDER = [5, 2, 4, 1, 7, 3, 6, 0]
GOLDEN_UNIFORM = [0.040214222428681556, 0.5884750301632897]
GOLDEN_KEYS = [2817768003791002974, 1384263886821751523]
GOLDEN_NUMBERS = [
    [0.8284524148330155, 0.0343942774192324, 0.7480232955350856],
    [0.39460332748576266, 0.5919004532561413, 0.32772463875618885],
]
