"""Targets that refuse to be written: a full disk, a read-only one, a file. The end is clear, and the run resumable."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from media_files import constant_rate, write_video
from shard_runs import contents, refuse_invalid_tars, run_here, temporaries, write_manifest

from alpro_sharding import ShardConfig, main, shard
from alpro_stream.config import validate
from alpro_stream.exit_status import HARDWARE

NUM_CLIPS = 8


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A configuration file without a target: eight clips of noise, some 120 kB each once they are frames."""
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0).integers(0, 255, (8, 96, 128, 3), np.uint8)
    for number in range(NUM_CLIPS):
        write_video(
            folder / f"{number}.mp4", constant_rate(8, 4), width=128, height=96, pixels=np.roll(noise, number, 0)
        )
    rows = [{"id": str(number), "media": f"{number}.mp4", "captions": ["a dog"]} for number in range(NUM_CLIPS)]
    manifest = write_manifest(folder / "manifest.jsonl", *rows)
    return {"manifest": str(manifest), "frames": {"fps": 4, "size": 128}, "samples_per_shard": 1}


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "shards"
    shard(validate(ShardConfig, {**options, "out": str(out)}, "test"), run=run_here)
    return contents(out)


@pytest.fixture
def run(options, tmp_path, capsys):
    """Runs the command on a target; gives the exit status and what it said."""

    def run(out):
        file = tmp_path / "shard.yaml"
        frames = "frames: {fps: 4, size: 128}"
        file.write_text(f"manifest: {options['manifest']}\n{frames}\nsamples_per_shard: 1\nout: {out}\n")
        status = main([str(file)])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def disk(tmp_path):
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave_room(disk, num_bytes):
    """Fills the disk up to so many bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    space = os.statvfs(disk)
    ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - num_bytes))


def test_a_full_disk_ends_the_run_and_nothing_is_corrupt(disk, run, undisturbed):
    out = disk / "shards"
    num_made = []
    # Full before the ledger, in the middle of it, of a tar, after some shards, of the page.
    for room in (0, 4096, 16384, 65536, 140_000, 200_000, 300_000, 400_000):
        leave_room(disk, room)
        status, said = run(out)
        assert status == HARDWARE, f"{room} bytes were enough"
        assert re.search(rf"error: cannot write (to )?{re.escape(str(out))}(/[^ ]*)?: No space left", said), said
        assert "Traceback" not in said
        refuse_invalid_tars(out)
        num_made.append(len(list(out.glob(".ledger/train/*.json"))))
        assert num_made[-1] == NUM_CLIPS or not (out / "train/dataset.json").exists()
    assert num_made[-1] > 0
    assert num_made == sorted(num_made), "a run lost what another had made"
    (disk / "ballast").unlink()
    assert run(out) == (0, "")
    assert contents(out) == undisturbed
    assert not temporaries(out)


def test_a_disk_that_is_full_at_the_very_end(disk, run, undisturbed):
    out = disk / "shards"
    assert run(out) == (0, "")
    for name in ("report.html", "README.md", "failures.jsonl", "train/dataset.json"):
        (out / name).unlink()
    leave_room(disk, 4096)
    status, said = run(out)
    assert status == HARDWARE
    assert f"cannot write to {out}: No space left on device" in said
    refuse_invalid_tars(out)
    (disk / "ballast").unlink()
    assert run(out) == (0, "")
    assert contents(out) == undisturbed
    assert not temporaries(out)


def test_a_target_that_can_only_be_read(disk, run, undisturbed):
    out = disk / "shards"
    assert run(out) == (0, "")
    (out / ".ledger/train/video-000002.json").unlink()
    before = contents(out)

    def mount_again(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    mount_again("ro")
    for target in (out, disk / "other"):
        status, said = run(target)
        assert status == HARDWARE
        assert f"cannot write to {target}: Read-only file system; choose another `out`" in said
    assert contents(out) == before
    mount_again("rw")
    assert run(out) == (0, "")
    assert contents(out) == undisturbed


@pytest.mark.parametrize("place", ["shards", "shards/train", "shards/.ledger"])
def test_a_target_that_is_a_file(run, tmp_path, place):
    out = tmp_path / "shards"
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    status, said = run(out)
    assert status == HARDWARE
    assert f"cannot write to {out}: " in said
    assert "Traceback" not in said
    assert (tmp_path / place).read_text() == "mine"
