"""Where a run is, which steps are still to come, and whether it may go on at all."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.errors import CheckpointError
from alpro_stream.stream.cursor import Cursor, check_fingerprint, num_steps_left, steps_left

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda pair: (pair[0], sum(pair))), max_size=5)


@pytest.mark.parametrize("cursor", [Cursor(0), Cursor(12345), Cursor(9, ((0, 2), (4, 9)))])
def test_a_cursor_survives_json(cursor):
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor


def test_a_cursor_without_a_record_of_skipped_steps_is_read():
    assert Cursor.from_dict({"step": 7}) == Cursor(7)


@given(first=st.integers(0, 45), stop=st.integers(0, 60), skip_steps=RANGES)
def test_steps_left_are_those_that_no_range_holds(first, stop, skip_steps):
    expected = [s for s in range(first, stop) if not any(begin <= s < end for begin, end in skip_steps)]
    assert list(steps_left(first, stop, skip_steps)) == expected
    assert num_steps_left(first, stop, skip_steps) == len(expected)


@given(stop=st.integers(0, 60), skip_steps=RANGES, later=RANGES, data=st.data())
def test_the_cursor_records_what_was_skipped_over_any_number_of_sittings(stop, skip_steps, later, data):
    """A run that is stopped anywhere and goes on, from some time on with more ranges than at first."""
    cursor, committed, given_from = Cursor(0), [], data.draw(st.integers(0, 60))
    while True:
        ranges = skip_steps if cursor.step < given_from else [*skip_steps, *later]
        left = list(steps_left(cursor.step, stop, ranges))
        if not left:
            break
        for step in left[: data.draw(st.integers(1, 20))]:
            cursor = cursor.after(step)
            committed.append(step)
        cursor = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
    assert cursor.step == (committed[-1] + 1 if committed else 0)
    skipped = [step for begin, end in cursor.skipped for step in range(begin, end)]
    assert sorted(committed + skipped) == list(range(cursor.step))
    assert skipped == sorted(skipped)


def test_an_equal_fingerprint_is_accepted(caplog):
    check_fingerprint({"seed": 1, "text": {"a": [1]}}, {"text": {"a": [1]}, "seed": 1}, "checkpoint")
    assert not caplog.records


def test_every_difference_is_named_with_both_values():
    saved = {"seed": 1, "text": {"num_tokens": 30}, "mix": "sizes"}
    current = {"seed": 2, "text": {"num_tokens": 24}, "mix": "sizes"}
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(saved, current, "runs/x/step-7")
    message = str(caught.value)
    assert message.startswith("runs/x/step-7 was written by another run")
    assert "seed: 1 != 2; text.num_tokens: 30 != 24." in message
    assert "accept=[seed, text.num_tokens]" in message
    assert "mix" not in message


SAVED = {"seed": 1, "sources": {"0": {"dataset": "a", "name": "x"}, "1": {"dataset": "c", "name": "y"}}, "seeded": 5}
NOW = {"seed": 2, "sources": {"0": {"dataset": "b", "name": "x"}, "1": {"dataset": "d", "name": "y"}}, "seeded": 6}


@pytest.mark.parametrize(
    ("accept", "refused"),
    [
        ((), ["seed", "seeded", "sources.0.dataset", "sources.1.dataset"]),
        (("seed",), ["seeded", "sources.0.dataset", "sources.1.dataset"]),
        (("sources.0", "seeded"), ["seed", "sources.1.dataset"]),
        (("sources", "seed"), ["seeded"]),
        # Not a beginning of a name, and not what is above it.
        (("see", "sources.0.dataset.x", "sources.0.data", "dataset"), ["seed", "seeded", "sources.0", "sources.1"]),
    ],
)
def test_only_what_is_named_may_differ(accept, refused, caplog):
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(SAVED, NOW, "checkpoint", accept)
    # The names are those to accept.
    named = str(caught.value).rpartition("accept=[")[2].rstrip("]").split(", ")
    assert len(named) == len(refused)
    assert all(name.startswith(expected) for name, expected in zip(sorted(named), sorted(refused), strict=True))
    assert not caplog.records


def test_what_is_accepted_is_said_with_both_values(caplog):
    with caplog.at_level(logging.WARNING, logger="alpro_stream"):
        check_fingerprint(SAVED, NOW, "runs/x/step-7", ("seed", "seeded", "sources"))
    (record,) = caplog.records
    assert "going on from runs/x/step-7 with other data than before" in record.message
    assert "seed: 1 != 2" in record.message
    assert "sources.1.dataset: 'c' != 'd'" in record.message
