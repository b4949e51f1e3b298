"""Runs of the sharding command in tests: how they are started, what they leave, and which processes are theirs."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from alpro_sharding import ShardConfig
from alpro_sharding.worker import make_shard
from alpro_stream.config import validate
from alpro_stream.shards import ShardReader

ROOT = Path(__file__).resolve().parents[2]
DEMO = "configs/demo/shard.yaml"
SHARD = [sys.executable, "-m", "sharding"]
MARK = "ALPRO_TEST_STARTED_BY"


def environment(marker):
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", MARK: str(marker)}


def run_command(marker, *arguments):
    command = [*SHARD, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(marker), capture_output=True, text=True, timeout=240)


def run_here(tasks, num_workers, on_result, on_poll):
    """Makes all shards in this process, one after the other: where Ray is not what is tested."""
    for task in tasks:
        on_result(task, make_shard(task))


def config_of(manifest, out, **options):
    """A configuration for small files."""
    values = {"manifest": str(manifest), "out": str(out), "frames": {"fps": 2, "size": 32}, "samples_per_shard": 2}
    return validate(ShardConfig, {**values, **options}, "test")


def contents(out):
    """Digest of every file of a shard set that must not depend on how it was made."""
    paths = [path for path in out.rglob("*") if path.is_file() and ".ledger" not in path.parts]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name not in ("shard_config.yaml", "report.html")  # the folder's name; times and machines
    }


def times_of_tars(out):
    """When each tar was written, by its path below `out`."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.tar")}


def temporaries(out):
    return [path for path in out.rglob("*") if path.name.endswith((".tmp", ".running"))]


def refuse_invalid_tars(out):
    """Fails when a tar with a note in the ledger is not the one that the note describes."""
    for note in (out / ".ledger").glob("[!_]*/*.json"):
        shard = json.loads(note.read_text())["shard"]
        if shard is not None:
            for suffix, digest in ((".tar", shard["sha256"]), (".idx", shard["index_sha256"])):
                data = (out / note.parent.name / f"{note.stem}{suffix}").read_bytes()
                assert hashlib.sha256(data).hexdigest() == digest, f"{note.stem}{suffix}"


def samples_of(directory):
    """(metadata, bytes of the frames) of every sample of a split."""
    shards = ShardReader(directory)
    return [
        (shards.metadata(info.name, slot), shards.read(info.name, slot, shards.frame_members(info.name, slot)))
        for info in shards.info.shards
        for slot in range(info.num_samples)
    ]


def failures_of(out):
    return [json.loads(line) for line in (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()]


def write_manifest(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def processes_of(marker):
    """Processes started, directly or not, with this mark in their environment; zombies have none."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(marker):
                found.add(process.pid)
    return found


def wait_until_gone(marker):
    for _ in range(120):
        if not processes_of(marker):
            return
        time.sleep(0.5)
    pytest.fail("processes stayed behind")
