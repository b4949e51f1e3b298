"""Statistics over seeds, against values of G*Power, of tables of the t distribution, and worked out by hand."""

import pytest

from alpro_launch.ablate.statistics import critical_t, paired, power, seeds_needed, spread


def test_mean_and_standard_deviation_are_those_of_a_sample():
    assert spread([1.0, 2.0, 4.5]) == (2.5, pytest.approx(1.80278, abs=1e-5))
    assert spread([3.0]) == (3.0, None)
    assert spread([]) == (None, None)


def test_differences_are_of_the_seeds_that_both_have():
    found = paired({0: 78.2, 1: 79.6, 2: 84.4, 3: 1.0}, {0: 72.7, 1: 81.6, 2: 72.7, 4: 9.0})
    assert found.differences == {0: pytest.approx(5.5), 1: pytest.approx(-2.0), 2: pytest.approx(11.7)}
    assert (found.mean, found.sd) == (pytest.approx(5.0667, abs=1e-4), pytest.approx(6.860, abs=1e-3))
    assert found.same_sign is False
    assert found.seeds_needed == 17


@pytest.mark.parametrize(
    ("values", "same_sign"),
    [([1.0, 2.0], True), ([-1.0, -0.1], True), ([1.0, -1e-9], False), ([1.0, 0.0], False), ([0.0, 0.0], False)],
)
def test_one_sign_in_every_seed(values, same_sign):
    assert paired(dict(enumerate(values)), {0: 0.0, 1: 0.0}).same_sign is same_sign


def test_one_seed_says_nothing_of_spread_sign_or_seeds():
    assert paired({0: 2.0}, {0: 1.0})[1:] == (1.0, None, None, None)
    assert paired({0: 2.0}, {1: 1.0})[1:] == (None, None, None, None)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (100, 1.9840)]
)
def test_limits_are_those_of_the_tables(degrees, value):
    assert critical_t(degrees) == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize(
    ("mean", "sd", "seeds"),
    [
        (0.8, 1.0, 15),  # G*Power 3.1: t test of matched pairs, two-sided 0.05, power 0.8
        (0.5, 1.0, 34),
        (0.2, 1.0, 199),
        (-0.2, 1.0, 199),
        (5.1, 6.8, 16),
        (7.6, 2.9, 4),
        (1.0, 0.0, 2),
        (0.0, 1.0, None),
        (0.0, 0.0, None),
        (0.001, 1.0, 7_848_880),
    ],
)
def test_seeds_for_a_power_of_80_per_cent(mean, sd, seeds):
    assert seeds_needed(mean, sd) == seeds


def test_power_of_no_effect_is_the_level_and_grows_with_seeds():
    assert power(0.5, 34) == pytest.approx(0.80778, abs=1e-5)  # G*Power
    assert power(0.0, 5) == pytest.approx(0.05, abs=1e-6)
    assert power(1.0, 5) < power(1.0, 6)
