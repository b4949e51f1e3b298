import json

import pytest

from alpro_stream.errors import CheckpointError
from alpro_stream.stream.cursor import Cursor, check_fingerprint


def test_a_cursor_survives_json():
    assert Cursor.from_dict(json.loads(json.dumps(Cursor(12345).to_dict()))) == Cursor(12345)


def test_an_equal_fingerprint_is_accepted():
    check_fingerprint({"seed": 1, "text": {"a": [1]}}, {"text": {"a": [1]}, "seed": 1}, "checkpoint")


def test_every_difference_is_named_with_both_values():
    saved = {"seed": 1, "text": {"num_tokens": 30}, "mix": "sizes"}
    current = {"seed": 2, "text": {"num_tokens": 24}, "mix": "sizes"}
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(saved, current, "runs/x/step-7")
    message = str(caught.value)
    assert message.startswith("runs/x/step-7 was written by another run")
    assert "seed: 1 != 2; text.num_tokens: 30 != 24." in message
    assert "mix" not in message
