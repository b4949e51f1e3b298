"""The whole stream beside what a user would take instead, from storage to a tensor: `python benchmarks/stream.py`.

Each is a process of its own that makes batches when it is told to, so that the samples of all can be taken in turn.
The peers need `make peers`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from alpro_stream.errors import AlproError
from benchmarks.corpus import EXAMPLES, make_shards
from benchmarks.harness import Measurement, Row, Target, main, measure

_FOLDER = Path("runs/bench/corpus").resolve()
_PEERS = Path("benchmarks/peers")
_PEERS_PYTHON = _PEERS / ".venv/bin/python"

_RAW = "raw libjpeg-turbo, bytes in memory"
_OURS = "stream, libjpeg-turbo"
_VIDEOS = "stream, stored videos"
_RATE = "clips_per_s"
_DETAILS = {"cpu_s_per_clip": ("CPU ms/clip", 1e3), "bytes_read_per_clip": ("kB/clip", 1e-3), "memory_mb": ("MB", 1.0)}

# What users of each would take instead, and how many times as fast the stream is to be.
_FASTER_THAN: Mapping[str, float | None] = {
    "mosaic": 1.8,
    "webdataset-turbo": 1.8,
    "webdataset-pil": 1.8,
    "energon": None,
    "torchcodec": None,
    "decord-3fps": 40.0,
    "decord": 100.0,
}


def rows(arguments: argparse.Namespace) -> list[Row]:
    """All in turn; the peers that are not installed are left out."""
    frames, videos = make_shards(_FOLDER), make_shards(_FOLDER, payload="video")
    seconds, repetitions = (1.0, 2) if arguments.quick else (3.0, 5)
    ours = {
        _RAW: (frames, None),
        _OURS: (frames, {}),
        "stream, libjpeg-turbo, published augmentation": (frames, {"augment": "published"}),
        "stream, DALI": (frames, {"decode": {"backend": "dali"}}),
        _VIDEOS: (videos, {}),
    }
    commands = {name: _our_command(shards, options) for name, (shards, options) in ours.items()}
    commands |= _peer_commands(frames)
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    with ExitStack() as stack:
        variants = {
            name: _sampler(stack.enter_context(_served(name, command)), seconds, answers[name])
            for name, command in commands.items()
        }
        found = measure(variants, repetitions)
    return list(_rows(found, answers))


def _rows(found: Mapping[str, Measurement], answers: Mapping[str, list[dict[str, float]]]) -> Iterator[Row]:
    for name, measurement in found.items():
        limit = found["torchcodec-files"] if name == _VIDEOS and "torchcodec-files" in found else found[_RAW]
        target = Target(at_least=0.8, of="ratio") if name == _OURS else None
        details = {
            shown: statistics.median(answer[key] for answer in answers[name]) * factor
            for key, (shown, factor) in _DETAILS.items()
        }
        yield Row.of(name, measurement, "clips/s", limit if name != _RAW else None, target, details)
    for name, factor in _FASTER_THAN.items():
        if name in found:
            value = found[_OURS].median / found[name].median
            target = None if factor is None else Target(at_least=factor)
            yield Row(name=f"stream over {name}", value=value, unit="x", target=target)


def _our_command(shards: Path, options: dict[str, Any] | None) -> list[str]:
    return [sys.executable, "-m", "benchmarks.stream_ours", str(shards), json.dumps(options)]


def _peer_commands(shards: Path) -> dict[str, list[str]]:
    if not _PEERS_PYTHON.is_file():
        return {}
    run = [str(_PEERS_PYTHON), str(_PEERS / "run.py")]
    data = _FOLDER / "peers"
    if not data.is_dir():
        source = str((EXAMPLES / "videos").resolve())
        subprocess.run([*run, "prepare", "--source", source, "--shards", str(shards), "--data", str(data)], check=True)
    return {name: [*run, name, "--data", str(data), "--serve"] for name in [*_FASTER_THAN, "torchcodec-files"]}


@contextmanager
def _served(name: str, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise AlproError(f"{name} could not be started; see what it says: {' '.join(command)}")
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _sampler(process: "subprocess.Popen[str]", seconds: float, answers: list[dict[str, float]]) -> Callable[[], float]:
    def sample() -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"go {seconds}\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
        return answers[-1][_RATE]

    return sample


if __name__ == "__main__":
    main("stream", rows)
