"""Checkpoints: what counts, what is removed, and what a failed write leaves."""

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from alpro_stream.errors import CheckpointError
from alpro_stream.train import checkpoint
from alpro_stream.train.checkpoint import (
    check_files,
    code_version,
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
    (directory / "engine").mkdir()
    (directory / "engine" / "moments.pt").write_bytes(b"moments")
    write_state(directory, {"cursor": {"step": 3}})


def save(run_dir, step, keep=2, write=write_files):
    return publish(run_dir, step, ALONE, [write], keep)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_is_whole_and_marked(tmp_path):
    path = save(tmp_path, 120)
    assert path == tmp_path / "checkpoints" / "step-000120"
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE", "engine", "model.safetensors", "state.json"]
    files = ("engine/moments.pt", "model.safetensors", "state.json")
    mark = {"format_version": 3, "sha256": {name: file_digest(path / name) for name in files}}
    assert json.loads((path / "COMPLETE").read_text()) == mark
    state = read_state(path)
    assert state["weights_sha256"] == file_digest(path / "model.safetensors")
    assert state["cursor"] == {"step": 3}
    assert state["code"] == code_version()


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
    (tmp_path / "checkpoints" / ".universal-step-000005").mkdir()
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
    with pytest.raises(CheckpointError, match="format version 7, this program reads 3"):
        read_state(path)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(path)


def test_a_checkpoint_of_the_format_before_counts_so_that_it_is_refused_by_name(tmp_path):
    path = save(tmp_path, 5)
    (path / "COMPLETE").write_text("2\n")
    (path / "state.json").write_text(json.dumps({"format_version": 2}))
    assert latest_checkpoint(tmp_path) == path
    with pytest.raises(CheckpointError, match="format version 2, this program reads 3: go on with the version"):
        read_state(path)
    with pytest.raises(CheckpointError, match=r"COMPLETE does not hold the digests of the checkpoint's files"):
        check_files(path, ["engine/"])


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: None, None),
        (lambda path: damage(path / "engine" / "moments.pt"), "engine/moments.pt is damaged: its SHA-256 is"),
        (lambda path: (path / "engine" / "moments.pt").unlink(), "engine/moments.pt is missing; bring an undamaged"),
        (lambda path: (path / "engine" / "more.pt").touch(), "engine/more.pt is no file of the checkpoint; remove it"),
        (lambda path: (path / "COMPLETE").unlink(), "COMPLETE does not hold the digests"),
        (lambda path: (path / "COMPLETE").write_text(""), "COMPLETE does not hold the digests"),
        # Of another part, which is read in another way.
        (lambda path: damage(path / "model.safetensors"), None),
    ],
)
def test_files_are_compared_with_the_mark(tmp_path, change, message):
    path = save(tmp_path, 5)
    change(path)
    if message is None:
        check_files(path, ["engine/"])
        return
    with pytest.raises(CheckpointError, match=message):
        check_files(path, ["engine/"])


def test_the_code_is_named_by_its_commit_or_by_its_version(tmp_path, monkeypatch):
    folder = tmp_path / "alpro_stream" / "train"
    folder.mkdir(parents=True)
    source = Path(checkpoint.__file__)
    copy = folder / source.name
    copy.write_text(source.read_text())
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def named():
        monkeypatch.setattr(checkpoint, "__file__", str(copy))
        code_version.cache_clear()
        return code_version()

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)

    try:
        assert named() == version("alpro-stream")
        git("init", "-q")
        # A checkout in which it lies without being part of it.
        git("commit", "--allow-empty", "-qm", "other")
        assert named() == version("alpro-stream")
        git("add", ".")
        git("commit", "-qm", "this")
        git("tag", "-am", "v", "v1")
        commit = git("rev-parse", "HEAD").stdout.strip()
        assert named() == commit
        copy.write_text("")
        assert named() == f"{commit}-dirty"
    finally:
        code_version.cache_clear()
