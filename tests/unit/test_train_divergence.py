"""When a loss is not a number or jumps: what is decided."""

import math

import pytest
from pydantic import ValidationError

from alpro_stream.train.divergence import DivergenceConfig, LossWatch


def watch(**changes):
    return LossWatch(DivergenceConfig.model_validate({"spike": 3.0, "window": 10, **changes}))


def steady(one, count=10, name="loss/vtc", value=2.0):
    for _ in range(count):
        assert one.judge({name: value}) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["stop", "warn"])
def test_what_is_no_number_is_found_at_once(value, action):
    values = {"loss/vtc": 1.0, "gradient_norm": value, "loss/mlm": 2.0}
    assert watch(on_nan=action).judge(values) == (action, f"gradient_norm is {value}")


def test_a_jump_is_one_over_the_median_of_the_last_values():
    one = watch(on_spike="stop")
    steady(one)
    assert one.judge({"loss/vtc": 5.9}) is None
    action, text = one.judge({"loss/vtc": 6.1})
    assert action == "stop"
    assert text == "loss/vtc is 6.1, 3.0 times its usual 2"
    # What jumped is not usual, however often it does.
    for _ in range(20):
        assert one.judge({"loss/vtc": 6.1}) is not None


def test_what_is_usual_follows_the_loss():
    one = watch()
    steady(one, 10, value=8.0)
    steady(one, 10, value=2.0)
    assert one.judge({"loss/vtc": 6.1}) == ("warn", "loss/vtc is 6.1, 3.0 times its usual 2")


def test_few_values_tell_nothing_and_each_loss_has_its_own():
    one = watch()
    steady(one, 9)
    assert one.judge({"loss/vtc": 100.0, "loss/mlm": 1.0}) is None
    assert one.judge({"loss/mlm": 100.0}) is None


def test_only_losses_jump_and_only_where_it_is_asked_for():
    one = watch()
    steady(one, name="gradient_norm")
    assert one.judge({"gradient_norm": 1000.0}) is None
    calm = watch(spike=None)
    steady(calm)
    assert calm.judge({"loss/vtc": 1000.0}) is None


def test_what_is_no_number_is_said_before_what_jumps():
    one = watch(on_spike="warn")
    steady(one)
    assert one.judge({"loss/vtc": 100.0, "loss/mlm": math.nan}) == ("stop", "loss/mlm is nan")


@pytest.mark.parametrize("changes", [{"spike": 1.0}, {"window": 5}, {"on_nan": "ignore"}])
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValidationError):
        watch(**changes)
