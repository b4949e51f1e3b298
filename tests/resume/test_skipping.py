"""Steps left out on purpose, and what they must not do to a run: come too late, or take its checkpoints away."""

import pytest
from dying_runs import config

from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.run import train
from alpro_stream.stream.cursor import Cursor, already_trained
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints, read_state


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("skip_steps", "late"),
    [
        ([(0, 1)], [(0, 1)]),
        ([(2, 4)], []),
        ([(3, 4)], []),
        ([(2, 5)], [(2, 5)]),
        ([(6, 9), (5, 7), (4, 9)], [(5, 7), (4, 9)]),
        ([(6, 9)], []),
    ],
)
def test_what_comes_too_late(skip_steps, late):
    """Of a run that has made 0, 1, 4 and 5, left out 2 and 3, and goes on with 6."""
    assert already_trained(Cursor(6, ((2, 4),)), skip_steps) == late


def test_steps_that_were_trained_on_cannot_be_skipped(corpus, tmp_path):
    train(config(corpus, tmp_path, **{"train.max_steps": 4, "train.checkpoint_every": 2}))
    late = {"train.max_steps": 6, "stream.skip_steps": [[1, 3]]}
    with pytest.raises(ConfigError, match=r"skip_steps=\[\[1, 3\]\]: the run goes on with step 4, and has trained on"):
        train(config(corpus, tmp_path, **late))
    # From before them on, they can.
    for checkpoint in complete_checkpoints(tmp_path):
        (checkpoint / "COMPLETE").unlink()
    again = train(config(corpus, tmp_path, **late))
    assert read_state(again.checkpoint)["cursor"] == {"step": 6, "skipped": [[1, 3]]}


def test_checkpoints_that_were_due_in_skipped_steps_come_after_them(corpus, tmp_path):
    changes = {"train.max_steps": 7, "train.checkpoint_every": 3, "train.keep_checkpoints": 9}
    train(config(corpus, tmp_path, **changes, **{"stream.skip_steps": [[2, 4]]}))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000005", "step-000006", "step-000007"]


def test_steps_of_which_one_made_the_loss_infinite_are_named(corpus, tmp_path):
    changes = {"train.max_steps": 8, "train.log_every": 4, "train.optimizer.learning_rate": 1e30}
    with pytest.raises(AlproError, match=r"step [48] cannot be used: .*stream\.skip_steps=\[\[[04],[48]\]\]"):
        train(config(corpus, tmp_path, **changes, **{"train.checkpoint_every": 100}))
