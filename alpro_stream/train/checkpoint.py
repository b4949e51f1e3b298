"""Checkpoints: written aside, published by a rename, complete only with their mark.

::

    RUN/checkpoints/step-000120/
        engine/            parameters and optimizer state, as DeepSpeed writes them
        config.json, model.safetensors, tokenizer/
                           the model alone, for anything that is not this run (`alpro_stream.model.folder`)
        config.yaml        the resolved configuration
        state.json         cursor, fingerprint of the data, prompter, versions, code
        COMPLETE           written last; digests of all other files

There is no random state in it, as none is carried from step to step: the order of the data, augmentation, masks and
negatives follow from the seed and the step, and dropout is seeded anew for each step.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alpro_stream.errors import AlproError, CheckpointError, RankError, SaveError
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.shards.storage import file_digest
from alpro_stream.train.distributed import World

FORMAT_VERSION = 3
STATE_FILE = "state.json"
_COMPLETE = "COMPLETE"
_NAME = re.compile(r"step-(\d+)")
_HASHING_THREADS = 4


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after so many steps."""
    return f"step-{step:06d}"


def publish(run_dir: Path, step: int, world: World, writers: Sequence[Callable[[Path], None]], keep: int) -> Path:
    """Writes a checkpoint on all ranks and makes it visible at once.

    Args:
        run_dir: directory of the run.
        step: committed steps.
        world: the ranks; each calls this.
        writers: called one after the other on every rank, with the directory to write into; each when all ranks are
            done with the one before. A writer may wait for the other ranks, so where one rank fails it raises only
            after all of that.
        keep: complete checkpoints to leave, this one included.

    Raises:
        AlproError: a rank could not write (a full disk, say); earlier checkpoints stay as they are.
    """
    folder = run_dir / "checkpoints"
    final, aside = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.partial"
    try:
        with _stage(world, step, folder):
            if world.is_first:
                _remove_unfinished(folder)
                aside.mkdir(parents=True)
        # One after the other, all ranks each: what gathers from all must not be begun by those alone that have room.
        for write in writers:
            with _stage(world, step, folder), world.waiting("what all ranks write", at_work=True):
                write(aside)
        with _stage(world, step, folder):
            if world.local_rank == 0:
                _flush(aside)
        with _stage(world, step, folder):
            if world.is_first:
                digests = _digests(aside)
                aside.rename(final)
                write_mark(final, digests)
    except AlproError:
        if world.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    with world.all_or_none():
        if world.is_first:
            _remove_old(run_dir, keep)
    return final


@contextmanager
def _stage(world: World, step: int, folder: Path) -> Iterator[None]:
    """A part of a save that every rank has behind it before any of them begins the next."""
    with world.all_or_none():
        try:
            yield
        except RankError:
            raise
        except Exception as error:  # torch and safetensors have no common base of what a full disk makes them raise.
            raise SaveError(f"checkpoint of step {step} could not be written to {folder}: {error}") from error


def _remove_unfinished(folder: Path) -> None:
    """Removes what runs that were killed while saving left; never complete, so nobody can be reading it."""
    unmarked = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and not _is_complete(path)]
    for path in (*folder.glob(".step-*.partial"), *folder.glob(".universal-step-*"), *unmarked):
        shutil.rmtree(path, ignore_errors=True)


def _remove_old(run_dir: Path, keep: int) -> None:
    for old in complete_checkpoints(run_dir)[:-keep]:
        # Without its mark first: a removal that is interrupted must not leave a half checkpoint that counts.
        (old / _COMPLETE).unlink()
        shutil.rmtree(old, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Waits until the files of this node are on the disk: the mark must not survive a power cut that they do not."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in there; several files at a time, as hashing lets other threads run."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = list(pool.map(file_digest, files))
    return {path.relative_to(directory).as_posix(): digest for path, digest in zip(files, digests, strict=True)}


def write_mark(checkpoint: Path, digests: dict[str, str] | None = None) -> None:
    """Marks a checkpoint as complete.

    Args:
        checkpoint: its directory, with everything in it.
        digests: SHA-256 of its files by path in it; computed when not given.
    """
    mark = {"format_version": FORMAT_VERSION, "sha256": _digests(checkpoint) if digests is None else digests}
    # By a rename too: half a mark would make the checkpoint count that cannot be checked.
    aside = checkpoint / f".{_COMPLETE}.partial"
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(mark, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(checkpoint / _COMPLETE)
    # The names too, before an older checkpoint is removed for this one. Some file systems cannot, and need not.
    for folder in (checkpoint, checkpoint.parent):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_files(checkpoint: Path, parts: Sequence[str]) -> None:
    """Compares files of a checkpoint with the digests of its completion mark.

    Args:
        checkpoint: its directory.
        parts: files in it, and folders, which end with a slash.

    Raises:
        CheckpointError: a file is damaged, missing, or was not there when the checkpoint was completed.
    """
    path = checkpoint / _COMPLETE
    try:
        recorded: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not hold the digests of the checkpoint's files ({error}), without which none of its engine "
            f"state is loaded; {_remedy(checkpoint)}"
        ) from error
    folders = tuple(part for part in parts if part.endswith("/"))
    expected = {name: digest for name, digest in recorded.items() if name in parts or name.startswith(folders)}
    found = {f"{folder}{name}": digest for folder in folders for name, digest in _digests(checkpoint / folder).items()}
    found |= {name: file_digest(checkpoint / name) for name in parts if (checkpoint / name).is_file()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{checkpoint / name} is missing; {_remedy(checkpoint)}")
        if name not in expected:
            raise CheckpointError(f"{checkpoint / name} is no file of the checkpoint; remove it")
        if found[name] != expected[name]:
            raise CheckpointError(
                f"{checkpoint / name} is damaged: its SHA-256 is {found[name]}, the completion mark says "
                f"{expected[name]}; {_remedy(checkpoint)}"
            )


def _remedy(checkpoint: Path) -> str:
    return f"bring an undamaged copy, or remove {checkpoint} to go on from the checkpoint before it"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step-*")
        # Not the copies that people make, such as step-000100-good.
        if (match := _NAME.fullmatch(path.name)) and _is_complete(path)
    }
    # By number: from a million steps on, the names do not sort.
    return [found[step] for step in sorted(found)]


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / _COMPLETE).is_file()


def latest_checkpoint(path: Path) -> Path:
    """The checkpoint a path means: itself, or the newest complete one of the run in it.

    Raises:
        CheckpointError: there is none.
    """
    if _is_complete(path):
        return path
    found = complete_checkpoints(path)
    if not found:
        what = "a checkpoint that was not finished" if (path / STATE_FILE).is_file() else "no complete checkpoint"
        raise CheckpointError(f"{path} holds {what}; give the directory of a run or of a checkpoint (`alpro train`)")
    return found[-1]


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Writes state.json, with the digest of the weights that are already there and the version of the code."""
    digest = file_digest(directory / WEIGHTS_FILE)
    values = {"format_version": FORMAT_VERSION, "weights_sha256": digest, "code": code_version(), **state}
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (directory / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def read_state(directory: Path) -> dict[str, Any]:
    """Reads state.json.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {_remedy(directory)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state of a run; {_remedy(directory)}")
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state.get('format_version')}, this program reads {FORMAT_VERSION}: go on with "
            "the version of alpro-stream that wrote it, or set start_from to its model, saved by `alpro export`"
        )
    return state


@cache
def code_version() -> str:
    """The commit of the checkout that the library runs from, with ``-dirty`` where it was changed; else its version."""
    folder = Path(__file__).parent
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        # An installed package may lie inside the checkout of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("alpro-stream")
