"""The order at scale, 10 million samples in 10,000 shards: opening, resuming, the cost of a batch, memory over time.

``dataset.json`` lists 10,000 shards of 1,000 samples, all of which are there, as links to one real shard of small
frames: what is opened and read is what a real data set of that size would have read. What is timed or weighed runs in a
process of its own. Samples in flight do not grow with the data set, so the soak takes one of 100 shards, where its
100,000 clips are a whole pass. The index of a shard, made up and in memory, is parsed in this one.

Limits, in the same process: for opening, parsing ``dataset.json`` with nothing checked; for the loader, libjpeg-turbo
on the same frames in memory in as many threads as it has workers. Planning has none: it is arithmetic alone.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from alpro_stream.errors import ConfigError
from alpro_stream.shards.index import Member, ShardIndex, format_index
from alpro_stream.shards.layout import DATASET_FILE, DatasetInfo, index_path, save_dataset_info, shard_name, tar_path
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.config import StreamConfig, make_plan
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.plan import Plan, SourceShape, lanes_of_rank
from alpro_stream.stream.quarantine import Quarantine
from alpro_stream.stream.sources import Source, Storage, open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import write_dataset, write_tokenizer
from benchmarks.harness import Measurement, Row, Target, main, measure
from benchmarks.timing import repeat

NUM_SHARDS, SHARD_SIZE, SOAK_SHARDS = 10_000, 1_000, 100
GLOBAL_BATCH, NUM_LANES, NUM_RANKS = 256, 16, 16
STORED_SIZE, IMAGE_SIZE, PATCH_SIZE, NUM_FRAMES = 64, 56, 8, 2
INDEX_FRAMES = 21
"""Of a sample in the index that is parsed; 23 members with metadata and caption."""
PLANNED_STEPS = 1_000
"""Timed together: a lane mixes a window every 500 steps, so that each sample holds equally many."""
_WARM_SHARE = 0.2
"""Of the soak, left out of the slope: buffers and caches fill."""


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measures everything; `--quick` repeats less and soaks 5,000 clips."""
    with tempfile.TemporaryDirectory(prefix="alpro-plan-") as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        large = write_links(folder / "large", NUM_SHARDS)
        soak = write_links(folder / "soak", SOAK_SHARDS)
        return [
            *_open_rows(large, 1 if arguments.quick else 5),
            *_resume_rows(large, 1 if arguments.quick else 7),
            *index_rows(2 if arguments.quick else 15),
            *plan_rows((SHARD_SIZE,) * NUM_SHARDS, PLANNED_STEPS, 2 if arguments.quick else 7),
            # The few clips of a quick one are over before the buffers have filled: nothing to promise there.
            *(_soak_rows(soak, 5_000, None) if arguments.quick else _soak_rows(soak, 100_000, Target(at_most=1))),
        ]


def write_links(directory: Path, num_shards: int) -> Path:
    """A data set of many shards that are links to a single one; returns its directory."""
    (shard,) = write_dataset(directory, video_shards=[SHARD_SIZE], num_frames=NUM_FRAMES, size=STORED_SIZE).shards
    for number in range(1, num_shards):
        for path_of in (tar_path, index_path):
            os.link(path_of(directory, shard.name), path_of(directory, shard_name("video", number)))
    shards = [shard.model_copy(update={"name": shard_name("video", number)}) for number in range(num_shards)]
    save_dataset_info(
        directory, DatasetInfo.of_shards("train", {"payload": "frames", "frames": {"size": STORED_SIZE}}, shards)
    )
    return directory


def _open_rows(directory: Path, repetitions: int) -> list[Row]:
    answers: list[dict[str, float]] = []

    def open_once() -> float:
        answers.append(_ask("open", directory))
        return answers[-1]["seconds"]

    seconds = measure({"open": open_once}, repetitions)["open"]
    counted = answers[-repetitions:]
    grown, whole, parsing = (
        Measurement(tuple(answer[key] for answer in counted)) for key in ("grown_mb", "peak_mb", "parse_s")
    )
    return [
        Row.of("opening", seconds, "s", parsing, Target(at_most=2), limit_of="parsing the JSON"),
        Row.of("memory that opening takes", grown, "MB", target=Target(at_most=300)),
        Row.of("memory of the process, imports included", whole, "MB"),
    ]


def _resume_rows(directory: Path, repetitions: int) -> list[Row]:
    middle = NUM_SHARDS * SHARD_SIZE // GLOBAL_BATCH // 2
    found = measure(
        {
            place: functools.partial(lambda step: _ask("first", directory, step)["seconds"], step)
            for place, step in (("start", 0), ("middle", middle))
        },
        repetitions,
    )
    # Round by round: both of a round met the same moment of the machine.
    pairs = zip(found["middle"].samples, found["start"].samples, strict=True)
    beyond = Measurement(tuple(resumed - started for resumed, started in pairs))
    return [
        Row.of("first batch, start of a pass", found["start"], "s"),
        Row.of("first batch, resumed in the middle", found["middle"], "s"),
        Row.of("resumed in the middle, beyond the start", beyond, "s", target=Target(at_most=1)),
    ]


def index_rows(repetitions: int) -> list[Row]:
    """A shard's index: its size, and parsing all of it; a step parses no lines but those of its samples."""
    extensions = ["json", "txt", *(f"{frame:03d}.jpg" for frame in range(INDEX_FRAMES))]
    data = format_index(
        [
            [
                Member(extension, 16_384 * (slot * len(extensions) + place), 15_000, f"{slot:09d}.{extension}")
                for place, extension in enumerate(extensions)
            ]
            for slot in range(SHARD_SIZE)
        ]
    )

    def parse_ms() -> float:
        started = time.perf_counter()
        index = ShardIndex(data, "of the benchmark")
        for slot in range(len(index)):
            index.members(slot)
        return 1000 * (time.perf_counter() - started)

    name = f"index of {SHARD_SIZE * len(extensions):,} members"
    parsing = measure({"parse": parse_ms}, repetitions)["parse"]
    return [Row.of(f"{name}: parsing", parsing, "ms"), Row(name=f"{name}: size", value=len(data) / 1e6, unit="MB")]


def plan_rows(shard_sizes: tuple[int, ...], num_steps: int, repetitions: int) -> list[Row]:
    """What planning a batch costs, all lanes and one rank's share, at several places of a run.

    Args:
        shard_sizes: samples of each shard.
        num_steps: successive steps that are timed together.
        repetitions: samples of each cost.
    """
    shape = SourceShape("video", shard_sizes)
    steps_per_pass = shape.num_samples // GLOBAL_BATCH
    places = {
        "start": 0,
        "middle": steps_per_pass // 2,
        "end": max(0, steps_per_pass - num_steps - 1),
        "100th pass": 99 * steps_per_pass + steps_per_pass // 3,
    }
    shares = {"whole batch": range(NUM_LANES), f"a rank of {NUM_RANKS}": lanes_of_rank(5, NUM_RANKS, NUM_LANES)}
    variants: dict[str, Callable[[], float]] = {
        f"{share}, {place}": functools.partial(_plan_ms, shape, lanes, step, num_steps)
        for share, lanes in shares.items()
        for place, step in places.items()
    }
    found = measure(variants, repetitions)
    result = [Row.of(f"plan of a batch: {name}", cost, "ms") for name, cost in found.items()]
    for share in shares:
        costs = [found[f"{share}, {place}"].median for place in places]
        result.append(
            Row(
                name=f"plan of a batch: {share}, dearest over cheapest",
                value=max(costs) / min(costs),
                unit="x",
                target=Target(at_most=1.5),
            )
        )
    return result


def _plan_ms(shape: SourceShape, lanes: range, first: int, num_steps: int) -> float:
    plan = Plan([shape], seed=42, global_batch=GLOBAL_BATCH, num_lanes=NUM_LANES, window_shards=8)
    plan.part(first, lanes)  # The windows it begins in are mixed: part of a resume, measured there.
    started = time.perf_counter()
    for step in range(first + 1, first + 1 + num_steps):
        plan.part(step, lanes)
    return 1000 * (time.perf_counter() - started) / num_steps


def _soak_rows(directory: Path, num_clips: int, target: Target | None) -> list[Row]:
    answer = _ask("soak", directory, num_clips // GLOBAL_BATCH)
    name = f"memory over {num_clips:,} clips"
    return [
        Row(name=name, value=answer["slope_mb"], unit="MB/10,000 clips", target=target),
        Row(name="peak memory of that process", value=answer["peak_mb"], unit="MB"),
        Row(
            name="clips of 64x64 through the loader",
            value=answer["clips_per_s"],
            unit="clips/s",
            limit=answer["raw_clips_per_s"],
            limit_of="raw libjpeg-turbo",
        ),
    ]


def _ask(what: str, directory: Path, number: int = 0) -> dict[str, float]:
    """What a process of its own measures; its messages go to the screen."""
    command = [sys.executable, "-m", "benchmarks.plan", "--worker", what, str(directory), str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the process that measures {what!r} ended with status {done.returncode}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def serve(what: str, directory: Path, number: int) -> dict[str, float]:
    """The other side of `_ask`."""
    return {"open": _open, "first": _first_batch, "soak": _soak}[what](directory, number)


def _open(directory: Path, number: int) -> dict[str, float]:
    del number
    config = _config(directory)
    before, started = _memory_mb("VmRSS"), time.perf_counter()
    make_plan(config, _sources(config))
    seconds, peak = time.perf_counter() - started, _memory_mb("VmHWM")
    text = (directory / DATASET_FILE).read_bytes()
    parse_s = statistics.median(repeat(lambda: json.loads(text), 5))
    return {"seconds": seconds, "grown_mb": peak - before, "peak_mb": peak, "parse_s": parse_s}


def _first_batch(directory: Path, step: int) -> dict[str, float]:
    with closing(_maker(directory)) as maker:
        plan = make_plan(maker.config, maker.sources)
        started = time.perf_counter()
        with closing(Loader(maker, plan, rank=0, world_size=1, first_step=step, last_step=step + 1)) as loader:
            next(iter(loader))
            return {"seconds": time.perf_counter() - started}


def _soak(directory: Path, num_steps: int) -> dict[str, float]:
    memory = []
    with closing(_maker(directory)) as maker:
        plan = make_plan(maker.config, maker.sources)
        started = time.perf_counter()
        with closing(Loader(maker, plan, rank=0, world_size=1, first_step=0, last_step=num_steps)) as loader:
            for _ in loader:
                memory.append(_memory_mb("VmRSS"))
        seconds = time.perf_counter() - started
        raw_clips_per_s = _raw_clips_per_s(maker)
    warm = int(_WARM_SHARE * len(memory))
    slope = float(np.polyfit(np.arange(warm, len(memory)), memory[warm:], 1)[0])
    return {
        "slope_mb": slope * 10_000 / GLOBAL_BATCH,
        "peak_mb": _memory_mb("VmHWM"),
        "clips_per_s": num_steps * GLOBAL_BATCH / seconds,
        "raw_clips_per_s": raw_clips_per_s,
    }


def _raw_clips_per_s(maker: BatchMaker) -> float:
    """Clips of stored frames that are decoded whole from memory, in a thread a worker."""
    reader = maker.sources[0].reader
    shard = reader.info.shards[0].name
    jpegs = [jpeg for slot in range(SHARD_SIZE) for jpeg in reader.read(shard, slot, reader.frame_members(shard, slot))]
    with ThreadPoolExecutor(maker.config.decode.num_workers) as pool:
        seconds = statistics.median(repeat(lambda: [*pool.map(simplejpeg.decode_jpeg, jpegs, chunksize=64)], 5))
    return len(jpegs) / NUM_FRAMES / seconds


def _sources(config: StreamConfig) -> tuple[Source, ...]:
    # As many open shards as a run of one rank asks for.
    return open_sources(config.sources, config.unit, Storage(max_open=config.num_lanes * config.window_shards))


def _maker(directory: Path) -> BatchMaker:
    config = _config(directory)
    return BatchMaker(
        config,
        _sources(config),
        Tokenizer(config.text.tokenizer, config.text.num_tokens),
        build_clip_decoder(config.decode, IMAGE_SIZE, GLOBAL_BATCH * NUM_FRAMES, None),
        NUM_FRAMES,
        IMAGE_SIZE,
        PATCH_SIZE,
        Quarantine(config.quarantine),
    )


def _config(directory: Path) -> StreamConfig:
    values: dict[str, Any] = {
        "sources": [{"path": str(directory)}],
        "global_batch": GLOBAL_BATCH,
        "num_lanes": NUM_LANES,
        "text": {"tokenizer": str(directory.parent / "tokenizer"), "num_tokens": 12},
    }
    return StreamConfig.model_validate(values)


def _memory_mb(entry: str) -> float:
    # Of this process alone: getrusage counts from what its parent had when it was started.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{entry}:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _, _, worker, where, steps = sys.argv
        print(json.dumps(serve(worker, Path(where), int(steps))))
    else:
        main("plan", rows)
