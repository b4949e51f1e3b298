"""The learning rate against values of the published code (peak 1e-4, 1000 updates)."""

import pytest

from alpro_stream.train.schedule import learning_rate

PUBLISHED = {
    0.05: {1: 2e-6, 2: 4e-6, 10: 2e-5, 49: 9.8e-5, 50: 1e-4, 51: 9.989473684210526e-05, 100: 9.473684210526316e-05}
    | {
        250: 7.894736842105263e-05,
        500: 5.2631578947368424e-05,
        750: 2.6315789473684212e-05,
        999: 1.0526315789473685e-07,
    }
    | {1000: 1e-8, 1001: 1e-8},
    0.1: {1: 1e-6, 2: 2e-6, 10: 1e-5, 49: 4.9e-5, 50: 5e-5, 51: 5.1e-5, 100: 1e-4, 250: 8.333333333333334e-05}
    | {500: 5.555555555555556e-05, 750: 2.777777777777778e-05, 999: 1.1111111111111112e-07, 1000: 1e-8, 1001: 1e-8},
}


@pytest.mark.parametrize("warmup_ratio", PUBLISHED)
def test_published_values(warmup_ratio):
    for step, expected in PUBLISHED[warmup_ratio].items():
        assert learning_rate(step, 1000, 1e-4, warmup_ratio) == pytest.approx(expected, rel=1e-12), step


def test_short_runs_have_a_rate_above_0_at_every_step():
    for num_steps in (1, 2, 3, 19, 21):
        rates = [learning_rate(step, num_steps, 1e-3, 0.05) for step in range(1, num_steps + 1)]
        assert all(0 < rate <= 1e-3 for rate in rates)
        assert rates[-1] == 1e-8


def test_without_warm_up_it_only_falls():
    rates = [learning_rate(step, 50, 1e-3, 0.0) for step in range(1, 51)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3 * 49 / 50)
