"""Checkpoints: what counts, what is removed, and what a failed write leaves."""

import json
import re

import pytest
import torch

from alpro_stream.errors import CheckpointError
from alpro_stream.train.checkpoint import (
    complete_checkpoints,
    file_digest,
    latest_checkpoint,
    publish,
    read_state,
    write_state,
)
from alpro_stream.train.distributed import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def write_files(directory):
    (directory / "model.safetensors").write_bytes(b"weights")
    write_state(directory, {"cursor": {"step": 3}})


def save(run_dir, step, keep=2, write=write_files):
    return publish(run_dir, step, ALONE, write, keep)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_is_whole_and_marked(tmp_path):
    path = save(tmp_path, 120)
    assert path == tmp_path / "checkpoints" / "step-000120"
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE", "model.safetensors", "state.json"]
    state = read_state(path)
    assert state["weights_sha256"] == file_digest(path / "model.safetensors")
    assert state["cursor"] == {"step": 3}


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000015", "step-000020"]
    save(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-000025"]


def test_order_is_by_number_also_from_a_million_steps_on(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]
    assert latest_checkpoint(tmp_path).name == "step-1000001"


def test_unfinished_ones_do_not_count_and_go_with_the_next_save(tmp_path):
    save(tmp_path, 5)
    (save(tmp_path, 10) / "COMPLETE").unlink()
    (tmp_path / "checkpoints" / ".step-000012.partial").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-000005"
    save(tmp_path, 15)
    assert names(tmp_path) == ["step-000005", "step-000015"]


def test_a_copy_somebody_made_is_neither_counted_nor_removed(tmp_path):
    for name in ("step-000005-good", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    for step in (10, 15):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["notes", "step-000005-good", "step-000015"]
    assert latest_checkpoint(tmp_path / "checkpoints" / "step-000005-good").name == "step-000005-good"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_half_written(tmp_path, error):
    save(tmp_path, 5, keep=1)

    def fail(directory):
        write_files(directory)
        raise error

    with pytest.raises(CheckpointError, match=f"step 10 could not be written to .*{re.escape(str(error))}"):
        save(tmp_path, 10, keep=1, write=fail)
    assert names(tmp_path) == ["step-000005"]


def test_a_path_means_itself_or_the_newest_of_its_run(tmp_path):
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == newer
    assert latest_checkpoint(older) == older


def test_where_there_is_none_the_error_says_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint; give the directory of a run"):
        latest_checkpoint(tmp_path)
    unfinished = save(tmp_path, 5)
    (unfinished / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="a checkpoint that was not finished"):
        latest_checkpoint(unfinished)


def test_a_damaged_or_foreign_state_is_refused(tmp_path):
    path = save(tmp_path, 5)
    (path / "state.json").write_text('{"format_version": 2, "cur')
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(path)
    (path / "state.json").write_text(json.dumps({"format_version": 7}))
    with pytest.raises(CheckpointError, match="format version 7, this program reads 2"):
        read_state(path)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(path)
