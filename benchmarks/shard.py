"""Sharding: its rate beside the ffmpeg command's, what writing costs, memory of a worker and of the driver.

Steady state: workers and their media processes are up, Ray is not started. The clips are made here, from the example
clips: ordinary H.264 (640x360, 25 frames a second, 60 s, B-frames, key frames where x264 puts them: at cuts, at most
250 frames apart). All frames on the grid are stored, as ffmpeg stores them. The limit is the
``ffmpeg`` command on the same cores for the same work, in the faster of two ways: one clip after the other with all its
threads, or a command a core with one thread each. Needs the ``ffmpeg`` command. `decoding alone` is that command
without scaling, JPEG and files: what is left when all else costs nothing.

`plain Ray Data` is what one would write without us (``benchmarks/peers/ray_data_tars.py``: torchcodec in a map, then
``write_webdataset``), on as many cores and in a sitting with the others; Ray and its workers are up there too. It needs
`make peers`, and is left out without.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import psutil

from alpro_stream.errors import AlproError
from benchmarks.harness import Measurement, Row, Target, main, measure, quotients

_EXAMPLES = Path("examples/clips/videos")
_NUM_CORES = len(os.sched_getaffinity(0))
_SECONDS, _RATE = 60, 25
# Of the ffmpeg command, with the file in the end.
_AS_JPEGS = ("-vf", "fps=3,scale=256:256:flags=bicubic", "-q:v", "2", "%03d.jpg")
_NOWHERE = ("-f", "null", "-")
PEERS_PYTHON = Path("benchmarks/peers/.venv/bin/python")
_POLL_S = 0.01


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measures everything; `--quick` takes fewer clips, repetitions and manifest rows."""
    if shutil.which("ffmpeg") is None:
        raise AlproError("the ffmpeg command is not installed, and it is what sharding is compared with")
    num_clips, repetitions, num_rows = (4, 1, 200_000) if arguments.quick else (8, 7, 10_000_000)
    with tempfile.TemporaryDirectory(prefix="alpro-shard-") as name:
        folder = Path(name)
        clips = _make_clips(folder / "clips", num_clips)
        return [
            *_rate_rows(folder, clips, repetitions),
            *_memory_rows(folder),
            _driver_row(folder, num_rows),
        ]


def _rate_rows(folder: Path, clips: Sequence[Path], repetitions: int) -> list[Row]:
    with ExitStack() as stack:
        workers = {
            (sampling, count): stack.enter_context(
                closing(_Workers(folder / f"{sampling}-{count}", clips, sampling, count))
            )
            for sampling, count in (("exact", _NUM_CORES), ("exact", 1), ("keyframes", _NUM_CORES))
        }
        variants: dict[str, Callable[[], float]] = {
            f"{name}, {how}": partial(_ffmpeg_rate, clips, count, output)
            for name, output in (("ffmpeg", _AS_JPEGS), ("decoding", _NOWHERE))
            for how, count in (("all threads", 1), ("a command a core", _NUM_CORES))
        }
        variants |= {f"{sampling} {count}": each.rate for (sampling, count), each in workers.items()}
        if peer := _start_ray_data(clips, folder / "ray-data"):
            variants["plain Ray Data"] = stack.enter_context(closing(peer)).rate
        found = measure(variants, repetitions=repetitions)
        write = Measurement(tuple(workers["exact", _NUM_CORES].write_shares))
    return rate_rows(found, write)


def rate_rows(found: Mapping[str, Measurement], write: Measurement) -> list[Row]:
    """The rows of the rates that were measured, by variant.

    Args:
        found: clips a second.
        write: percent of a worker's time in which it wrote.
    """
    limit, decoding = (
        max(found[f"{name}, all threads"], found[f"{name}, a command a core"], key=lambda rate: rate.median)
        for name in ("ffmpeg", "decoding")
    )
    exact, keyframes = found[f"exact {_NUM_CORES}"], found[f"keyframes {_NUM_CORES}"]
    ffmpeg = "the ffmpeg command"
    rows = [
        Row.of("exact", exact, "clips/s", limit, Target(at_least=0.9, of="ratio"), limit_of=ffmpeg),
        Row.of("keyframes", keyframes, "clips/s", limit, Target(at_least=5, of="ratio"), limit_of=ffmpeg),
        Row.of("exact, beside decoding alone", exact, "clips/s", decoding, limit_of="ffmpeg, decoding alone"),
        Row.of(
            "a worker a core over one worker",
            exact,
            "clips/s",
            found["exact 1"],
            Target(at_least=1.6, of="ratio"),
            limit_of="one worker",
        ),
        Row.of("tar and index, of a worker's time", write, "%", target=Target(at_most=3)),
    ]
    if theirs := found.get("plain Ray Data"):
        rows.append(Row.of("plain Ray Data", theirs, "clips/s", limit, limit_of=ffmpeg))
        rows.append(Row.of("exact over plain Ray Data", quotients(exact, theirs), "x"))
    return rows


class _Workers:
    """Processes that make shards of their part of the clips, again and again, as Ray's workers do."""

    def __init__(self, folder: Path, clips: Sequence[Path], sampling: str, count: int) -> None:
        self.write_shares: list[float] = []
        self._num_clips = len(clips)
        self._processes = []
        for number in range(count):
            part = folder / str(number)
            part.mkdir(parents=True)
            mine = [str(clip) for clip in clips[number::count]]
            self._processes.append(start_worker({"clips": mine, "out": str(part), "sampling": sampling}))

    def rate(self) -> float:
        """Clips a second, all workers together."""
        started = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("shard\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            answer = process.stdout.readline()
            if not answer:
                raise AlproError("a worker of the benchmark ended")
            self.write_shares.append(100 * json.loads(answer)["write_share"])
        return self._num_clips / (time.perf_counter() - started)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.wait()


class _RayData:
    """The peer that shards by plain Ray Data, in the environment of the peers.

    Args:
        process: that answered that it is ready.
        num_clips: it makes shards of.
    """

    def __init__(self, process: "subprocess.Popen[str]", num_clips: int) -> None:
        self._process = process
        self._num_clips = num_clips

    def rate(self) -> float:
        """Clips a second."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = time.perf_counter()
        print("shard", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer or not json.loads(answer)["num_tars"]:
            raise AlproError("plain Ray Data wrote nothing; run benchmarks/peers/ray_data_tars.py by hand to see why")
        return self._num_clips / (time.perf_counter() - started)

    def close(self) -> None:
        """Ends it: Ray ends its workers when its input ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _start_ray_data(clips: Sequence[Path], out: Path) -> _RayData | None:
    """Starts the peer; None, with a word on the screen, where it is not installed."""
    if not PEERS_PYTHON.is_file():
        print("plain Ray Data is left out: it needs `make peers`", file=sys.stderr)
        return None
    command = [str(PEERS_PYTHON), str(PEERS_PYTHON.parents[2] / "ray_data_tars.py"), str(clips[0].parent), str(out)]
    process = subprocess.Popen(
        [*command, "--cores", str(_NUM_CORES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        process.kill()
        process.wait()
        print(f"plain Ray Data is left out: {' '.join(command)} ends; `make peers` again may help", file=sys.stderr)
        return None
    return _RayData(process, len(clips))


def start_worker(job: dict[str, object]) -> "subprocess.Popen[str]":
    """A process that makes the shard of `job` for each line that it reads, and answers with what that took."""
    command = [sys.executable, "-m", "benchmarks.shard_worker", json.dumps(job)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ffmpeg_rate(clips: Sequence[Path], num_commands: int, output: Sequence[str]) -> float:
    threads = [] if num_commands == 1 else ["-threads", "1"]

    def extract(clip: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            command = ["ffmpeg", "-v", "error", "-nostdin", *threads, "-i", str(clip), "-an", *output[:-1], *threads]
            subprocess.run([*command, output[-1]], check=True, cwd=out)

    started = time.perf_counter()
    with ThreadPoolExecutor(num_commands) as pool:
        list(pool.map(extract, clips))
    return len(clips) / (time.perf_counter() - started)


def _memory_rows(folder: Path) -> list[Row]:
    """The largest memory of a worker with its media processes, over ordinary and over outsized inputs."""
    inputs = {
        "example clips": sorted(_EXAMPLES.iterdir()),
        "8K H.264": [_encode(folder / "8k.mp4", "7680x4320", 10, ["-c:v", "libx264", "-preset", "ultrafast"])],
        "8K H.264, 5 references": [
            _encode(folder / "8kr.mp4", "7680x4320", 25, ["-c:v", "libx264", "-preset", "ultrafast", "-refs", "5"])
        ],
        "8K HEVC, 10 bit": [
            _encode(folder / "8k10.mp4", "7680x4320", 6, ["-c:v", "libx265", "-pix_fmt", "yuv420p10le"], "ultrafast")
        ],
        "4K H.264, 60 s": [_encode(folder / "4k.mp4", "3840x2160", 1500, ["-c:v", "libx264", "-preset", "ultrafast"])],
        "a PNG of 36 million pixels": [_encode(folder / "36m.png", "8000x4500", 1, ["-pix_fmt", "rgba"])],
    }
    found = []
    for name, files in inputs.items():
        out = folder / "memory" / name
        out.mkdir(parents=True)
        clips = [str(file.absolute()) for file in files]
        process = start_worker({"clips": clips, "out": str(out), "sampling": "exact"})
        memory = _PeakMemory(process.pid)
        answer, _ = process.communicate("shard\n")
        peak = memory.stop()
        # A file that needs more than `limits.memory_mb` is a failure of its row, and keeps the promise too.
        refused = len(files) - json.loads(answer)["num_samples"]
        title = f"memory of a worker: {name}" + (f" ({refused} refused)" if refused else "")
        found.append(Row(name=title, value=peak / 2**20, unit="MB", target=Target(at_most=800)))
    return found


class _PeakMemory:
    """Largest sum, seen a hundred times a second, of the memory of a process and all its descendants.

    Proportional set sizes: memory that processes share counts once.
    """

    def __init__(self, pid: int) -> None:
        self._peak = 0
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_S):
            try:
                family = [self._root, *self._root.children(recursive=True)]
                self._peak = max(self._peak, sum(process.memory_full_info().pss for process in family))
            except psutil.Error:
                continue  # one of them ended meanwhile


def _driver_row(folder: Path, num_rows: int) -> Row:
    """Memory of the driver for each row of a manifest, from reading it to describing its shards."""
    command = [sys.executable, "-m", "benchmarks.shard_driver", str(folder / "driver"), str(num_rows)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name = f"memory of the driver, {num_rows:,} rows"
    return Row(name=name, value=json.loads(answer)["bytes_per_row"], unit="bytes/row", target=Target(at_most=32))


def _make_clips(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    sources = sorted(_EXAMPLES.glob("*.mp4"))
    if not sources:
        raise AlproError(f"no clips in {_EXAMPLES}; run this in the folder of a checkout")
    clips = []
    for number in range(count):
        clip = folder / f"{number:02d}.mp4"
        command = ["ffmpeg", "-v", "error", "-nostdin", "-stream_loop", "-1", "-i", str(sources[number % len(sources)])]
        command += ["-t", str(_SECONDS), "-an", "-vf", "scale=640:360,setsar=1", "-r", str(_RATE)]
        subprocess.run([*command, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "medium", str(clip)], check=True)
        clips.append(clip)
    return clips


def _encode(path: Path, size: str, num_frames: int, codec: Sequence[str], x265_preset: str | None = None) -> Path:
    extra = ["-x265-params", "log-level=none", "-preset", x265_preset] if x265_preset else []
    source = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate=25"]
    subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", *source, "-frames:v", str(num_frames), *codec, *extra, str(path)],
        check=True,
    )
    return path


if __name__ == "__main__":
    main("shard", rows)
