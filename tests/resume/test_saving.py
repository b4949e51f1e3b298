"""Death while saving, and what else can go wrong with a run directory."""

import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from dying_runs import (
    POINTS,
    assert_same_run,
    config,
    die,
    die_while_saving,
    train_until_death,
    training,
    wait_at_step,
)

from alpro_stream.errors import AlproError, CheckpointError
from alpro_stream.run import train
from alpro_stream.testing.configs import write_corpus
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.checkpoint import complete_checkpoints, latest_checkpoint

PRELOAD = ("alpro_stream.run",)
STEPS = {"train.max_steps": 6, "train.checkpoint_every": 2, "train.keep_checkpoints": 1}
FAST = ("in the middle of the weights", "between the rename and the mark", "in the middle of the removal")
SAVED = ("between the mark and the removal", "in the middle of the removal")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    run = config(corpus, tmp_path_factory.mktemp("undisturbed"), **STEPS)
    train(run)
    return run.run_dir


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[] if point in FAST else pytest.mark.slow) for point in POINTS]
)
def test_killed_while_saving(corpus, undisturbed, tmp_path, point):
    run = config(corpus, tmp_path, **STEPS)
    assert train_until_death(run, die_while_saving, point, 4) == -signal.SIGKILL
    assert latest_checkpoint(tmp_path).name == ("step-000004" if point in SAVED else "step-000002")
    train(run)
    assert_same_run(tmp_path, undisturbed)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def die_in_the_middle_of_the_mark(step):
    """Death when the mark of a step is written and not yet where it counts."""
    replace = Path.replace

    def replace_or_die(self, target):
        if target.name == "COMPLETE" and target.parent.name == f"step-{step:06d}":
            self.write_text(self.read_text()[:20])
            die()
        return replace(self, target)

    Path.replace = replace_or_die


def test_killed_in_the_middle_of_the_mark(corpus, undisturbed, tmp_path):
    run = config(corpus, tmp_path, **STEPS)
    assert train_until_death(run, die_in_the_middle_of_the_mark, 4) == -signal.SIGKILL
    assert latest_checkpoint(tmp_path).name == "step-000002"
    assert (tmp_path / "checkpoints" / "step-000004").is_dir()
    train(run)
    assert_same_run(tmp_path, undisturbed)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def test_two_trainers_in_one_directory_are_refused(corpus, tmp_path):
    run, told = config(corpus, tmp_path / "run", **STEPS), tmp_path / "told"
    with training(run, wait_at_step, 1, told) as other:
        while not told.exists():
            assert other.is_alive()
            time.sleep(0.02)
        with pytest.raises(CheckpointError, match=f"another process is training in {run.run_dir}; wait for it"):
            train(run)
    assert not complete_checkpoints(run.run_dir)
    # The lock went with its process, though that was killed.
    assert not train(run).already_done


def test_a_damaged_engine_state_is_named(corpus, undisturbed, tmp_path):
    run = config(corpus, tmp_path / "run", **{**STEPS, "train.max_steps": 8})
    shutil.copytree(undisturbed, run.run_dir)
    file = latest_checkpoint(run.run_dir) / "engine" / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: its SHA-256 is .*, or remove .*step-000006 to go"):
        train(run)


def train_on_a_small_disk(corpus, run_dir, full_rank):
    """Trains on each rank; on one of them files stop growing after 20 kB, as on a full disk, from step 2 on."""
    import torch.distributed as dist

    train(config(corpus, run_dir, **{**STEPS, "train.max_steps": 2}))
    if dist.get_rank() == full_rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    # Memory that is shared with workers is a file too.
    return _message(config(corpus, run_dir, **STEPS, **{"stream.decode.workers": "threads"}))


def train_with_another_stage(corpus, run_dir):
    return _message(config(corpus, run_dir, **{**STEPS, "train.max_steps": 8, "train.engine.zero_stage": 2}))


def _message(run):
    try:
        train(run)
    except AlproError as error:
        return str(error)
    return "trained"


def test_a_full_disk_on_one_rank_ends_both_and_keeps_the_checkpoint_before(corpus, tmp_path):
    first, second = run_ranks(train_on_a_small_disk, 2, corpus, tmp_path, 1, preload=PRELOAD)
    assert "checkpoint of step 4 could not be written" in second
    assert "File too large" in second
    assert first == f"rank 1 failed: {second}"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_another_stage_is_refused_on_every_rank(corpus, undisturbed):
    first, second = run_ranks(train_with_another_stage, 2, corpus, undisturbed, preload=PRELOAD)
    for message in (first, second):
        assert "was written by 1 ranks with ZeRO stage 1, this run has 2 with stage 2" in message
        assert message.endswith("set train.engine.zero_stage=1")
