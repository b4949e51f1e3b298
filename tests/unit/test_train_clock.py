"""The shares of a step's time, against the clock that they are measured with."""

import itertools

import pytest

from alpro_stream.train import clock as clock_module
from alpro_stream.train.clock import StepClock


@pytest.fixture
def ticking(monkeypatch):
    """A second passes with every look at the clock."""
    seconds = itertools.count()
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: float(next(seconds)))


def test_waits_are_shares_of_the_step(ticking):
    clock = StepClock()  # 0
    with clock.waiting_for("data"):  # 1 to 2
        pass
    with clock.waiting_for("prompter"):  # 3 to 4
        pass
    with clock.waiting_for("data"):  # 5 to 6
        pass
    for _ in range(3):
        clock_module.time.perf_counter()  # 7, 8, 9
    assert clock.lap(40) == {  # 10
        "step_s": 10.0,
        "clips_per_s": 4.0,
        "data_wait_percent": 20.0,
        "prompter_wait_percent": 10.0,
    }
    assert clock.lap(8) == {  # from 11 to 12
        "step_s": 1.0,
        "clips_per_s": 8.0,
        "data_wait_percent": 0.0,
        "prompter_wait_percent": 0.0,
    }


def test_a_wait_counts_when_it_ends_in_an_error_and_a_restart_forgets_it(ticking):
    clock = StepClock()  # 0
    with pytest.raises(ValueError, match="broken"), clock.waiting_for("data"):  # 1 to 2
        raise ValueError("broken")
    assert clock.lap(1)["data_wait_percent"] == pytest.approx(100 / 3)  # 3
    with clock.waiting_for("data"):
        pass
    clock.restart()
    assert clock.lap(1)["data_wait_percent"] == 0
