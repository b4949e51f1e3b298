"""Death while saving, and what else can go wrong with a run directory."""

import resource
import shutil
import signal
import threading
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

from alpro_stream.errors import AlproError, CheckpointError, TakenError
from alpro_stream.run import _only_run_in, train
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


def test_two_trainers_in_one_directory_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("alpro_stream.run._LOCK_WAIT_S", 0.5)
    run, told = config(corpus, tmp_path / "run", **STEPS), tmp_path / "told"
    with training(run, wait_at_step, 1, told) as other:
        while not told.exists():
            assert other.is_alive()
            time.sleep(0.02)
        with pytest.raises(TakenError, match=f"another process is training in {run.run_dir}; wait for it"):
            train(run)
    assert not complete_checkpoints(run.run_dir)
    # The lock went with its process, though that was killed.
    assert not train(run).already_done


def test_a_run_waits_for_ranks_that_still_save(tmp_path, caplog):
    """Those of a launcher that was killed."""
    with _only_run_in(tmp_path, 10):
        over = threading.Event()
        seen = []

        def start_again():
            with _only_run_in(tmp_path, 10):
                seen.append(over.is_set())

        thread = threading.Thread(target=start_again)
        thread.start()
        while "waiting up to 10 s for it" not in caplog.text:
            time.sleep(0.01)
        over.set()
    thread.join(10)
    assert seen == [True]


def test_a_damaged_engine_state_is_named(corpus, undisturbed, tmp_path):
    run = config(corpus, tmp_path / "run", **{**STEPS, "train.max_steps": 8})
    shutil.copytree(undisturbed, run.run_dir)
    file = latest_checkpoint(run.run_dir) / "engine" / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: its SHA-256 is .*, or remove .*step-000006 to go"):
        train(run)


@pytest.mark.parametrize("name", ["state.json", "quarantine.jsonl"])
def test_a_damaged_or_missing_record_is_named(corpus, undisturbed, tmp_path, name):
    """It decides with which step and which samples the run goes on."""
    run = config(corpus, tmp_path / "run", **{**STEPS, "train.max_steps": 8})
    shutil.copytree(undisturbed, run.run_dir)
    file = latest_checkpoint(run.run_dir) / name
    content = file.read_text()
    file.write_text(content.replace('"step": 6', '"step": 5') or "{}")
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        train(run)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        train(run)


def test_going_on_needs_no_starting_weights(corpus, undisturbed, tmp_path):
    run = config(corpus, tmp_path / "run", **{**STEPS, "train.max_steps": 7}, start_from=str(tmp_path / "gone"))
    shutil.copytree(undisturbed, run.run_dir)
    assert train(run).num_steps == 7


def train_on_videos(corpus, run_dir, num_steps):
    videos = {"stream.sources": [{"path": str(corpus / "train"), "kind": "video"}], "train.engine.zero_stage": 3}
    return train(
        config(
            corpus,
            run_dir,
            **{**STEPS, **videos, "task": "pretrain", "losses.pem.weight": 0} | {"train.max_steps": num_steps},
        )
    ).num_steps


def test_zero_3_goes_on_after_a_save_of_a_run_that_went_on(corpus, tmp_path):
    """With one kind of samples all steps are alike, and DeepSpeed plans one by those before."""
    for num_steps in (2, 6):
        assert run_ranks(train_on_videos, 2, corpus, tmp_path, num_steps, preload=PRELOAD) == [num_steps] * 2


def train_with_a_configuration_of_its_own(corpus, run_dir):
    import torch.distributed as dist

    return _message(config(corpus, run_dir, **{**STEPS, "train.log_every": 2 + dist.get_rank()}))


def test_ranks_with_other_configurations_are_refused(corpus, tmp_path):
    first, second = run_ranks(train_with_a_configuration_of_its_own, 2, corpus, tmp_path, preload=PRELOAD)
    assert second.startswith("the configuration of this rank is not that of rank 0: train.log_every: 3 != 2")
    assert first == f"rank 1 failed: {second}"
    assert not complete_checkpoints(tmp_path)


def train_with_metrics_on_a_full_disk(corpus, run_dir):
    import torch.distributed as dist

    from alpro_stream.train.metrics import MetricsWriter

    def full(self, step, values):
        raise OSError(28, "No space left on device", str(run_dir / "metrics.jsonl"))

    if dist.get_rank() == 0:
        MetricsWriter.write = full
    return _message(config(corpus, run_dir, **STEPS))


def test_metrics_that_cannot_be_written_are_named_on_every_rank(corpus, tmp_path):
    first, second = run_ranks(train_with_metrics_on_a_full_disk, 2, corpus, tmp_path, preload=PRELOAD)
    assert "No space left on device" in first
    assert "rank 0 failed" in second
    assert "No space left on device" in second


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
    except (AlproError, OSError) as error:
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
