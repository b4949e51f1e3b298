"""The whole stream beside what a user would take instead, from storage to a tensor: `python benchmarks/stream.py`.

Each is a process of its own that makes batches when it is told to, so that the samples of all can be taken in turn.
The peers need `make peers`. Measured on the example clips, or with `--clips FOLDER` on the H.264 videos of any folder.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from alpro_stream.errors import AlproError
from benchmarks.corpus import Corpus, add_arguments, content, make_shards, open_corpus
from benchmarks.harness import Measurement, Row, Target, main, measure, quotients

_PEERS = Path("benchmarks/peers")
_PEERS_PYTHON = _PEERS / ".venv/bin/python"

_RAW = "raw libjpeg-turbo, bytes in memory"
_OURS = "stream, libjpeg-turbo"
_VIDEOS = "stream, stored videos"
_FILES = "torchcodec-files"
_RATE = "clips_per_s"
_DETAILS = {"cpu_s_per_clip": ("CPU ms/clip", 1e3), "bytes_read_per_clip": ("kB/clip", 1e-3), "memory_mb": ("MB", 1.0)}

# Ours: what the shards hold, and the stream's configuration (None: not the stream but its limit).
_STREAMS: Mapping[str, tuple[str, dict[str, Any] | None]] = {
    _RAW: ("frames", None),
    _OURS: ("frames", {}),
    "stream, libjpeg-turbo in threads": ("frames", {"decode": {"workers": "threads"}}),
    "stream, libjpeg-turbo, published augmentation": ("frames", {"augment": "published"}),
    "stream, DALI": ("frames", {"decode": {"backend": "dali"}}),
    _VIDEOS: ("video", {}),
}

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
_NAMES = [*_STREAMS, *_FASTER_THAN, _FILES]


def rows(arguments: argparse.Namespace) -> list[Row]:
    """All that are asked for in turn; the peers that are not installed are left out."""
    clips = open_corpus(arguments.clips)
    seconds, repetitions = (1.0, 2) if arguments.quick else (3.0, 5)
    wanted = arguments.only or _NAMES
    commands = {
        name: _our_command(make_shards(clips, payload), options)
        for name, (payload, options) in _STREAMS.items()
        if name in wanted
    }
    commands |= _peer_commands(clips, [name for name in _NAMES if name in wanted and name not in _STREAMS])
    if not commands:
        raise AlproError("none of these is installed; run `make peers`")
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
        limit_of = _FILES if name == _VIDEOS and _FILES in found else _RAW
        limit = found.get(limit_of) if name != _RAW else None
        target = Target(at_least=0.8, of="ratio") if name == _OURS and limit else None
        details = {
            shown: statistics.median(answer[key] for answer in answers[name]) * factor
            for key, (shown, factor) in _DETAILS.items()
        }
        yield Row.of(name, measurement, "clips/s", limit, target, details, limit_of if limit else "")
    for name, factor in _FASTER_THAN.items():
        if name in found and _OURS in found:
            target = None if factor is None else Target(at_least=factor)
            yield Row.of(f"stream over {name}", quotients(found[_OURS], found[name]), "x", target=target)


def _our_command(shards: Path, options: dict[str, Any] | None) -> list[str]:
    return [sys.executable, "-m", "benchmarks.stream_ours", str(shards), json.dumps(options)]


def _peer_commands(clips: Corpus, names: Sequence[str]) -> dict[str, list[str]]:
    if not names or not _PEERS_PYTHON.is_file():
        return {}
    run = [str(_PEERS_PYTHON), str(_PEERS / "run.py")]
    data = clips.home / "peers"
    if not data.is_dir():
        if shutil.which("ffmpeg") is None:
            raise AlproError("the ffmpeg command is not installed, and videos are encoded again with it for the peers")
        aside = data.with_name("peers.partial")
        inputs = ["--source", str(clips.folder.resolve()), "--shards", str(make_shards(clips))]
        subprocess.run([*run, "prepare", *inputs, "--data", str(aside)], check=True)
        aside.rename(data)
    return {name: [*run, name, "--data", str(data), "--serve"] for name in names}


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=_NAMES, metavar="NAME", help=f"measure these; of {_NAMES}")


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
    main("stream", rows, _arguments, content)
