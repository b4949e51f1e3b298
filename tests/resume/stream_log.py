"""Streams read in processes that die: what every rank got, in a log, and where the run was, in a file.

A sitting is one start of a run: its ranks read from the last commit on until they are done or killed.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

import alpro_stream.stream.maker
from alpro_stream.stream.cursor import Cursor
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.quarantine import RECORD_FOLDER, read_failures
from alpro_stream.train.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from stream_parts import Wrapped, open_maker, stream_config

NUM_LANES = 4
SAVE_EVERY = 2
POINTS = ("reader", "decoder", "step", "save")


def seeded():
    """Random numbers, another time others."""
    seed = random.randrange(10_000)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return random.Random(seed)


def write_entries(file, batch):
    """A line for each lane of a batch: its keys, and a digest of everything in it."""
    for part in batch.micro_batches(batch.num_lanes):
        file.write(json.dumps([part.step, part.first_lane, part.keys, digest(part)]) + "\n")
    file.flush()


def read_entries(path):
    """Keys and digest by step and lane, in the order of the log; an unfinished last line is left out."""
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
    entries = {(step, lane): (tuple(keys), digest) for step, lane, keys, digest in lines}
    assert len(entries) == len(lines), "a step came twice in one sitting"
    return entries


def digest(batch):
    """Of all that a lane holds; how many were replaced is counted by rank, and not a matter of a lane."""
    found = hashlib.sha256()
    for name in (one.name for one in fields(batch) if one.name != "num_quarantined"):
        value = getattr(batch, name)
        found.update(name.encode())
        found.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return found.hexdigest()


@dataclass
class Run:
    """A run whose model is nothing but a log.

    Attributes:
        root: of the data set and the tokenizer.
        folder: of logs, commits and the record of unusable samples.
        last_step: to stop before.
        changes: of the stream's settings.
        firsts: where each sitting began.
        sizes: ranks of each sitting.
    """

    root: Path
    folder: Path
    last_step: int
    changes: dict[str, Any] = field(default_factory=dict)
    firsts: list[Cursor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def sit(self, world_size, deaths=None, kill_after_lines=None):
        """Reads until all ranks are done, or one of them dies, and with it the others; whether they are done.

        Args:
            world_size: number of ranks.
            deaths: by rank, the point and at which of its calls a rank kills itself.
            kill_after_lines: lines of the first rank's log after which all are killed from outside.
        """
        number, cursor = len(self.sizes), self.cursor()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.firsts.append(cursor)
        self.sizes.append(world_size)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["alpro_stream.run", "stream_log"])
        processes = [
            context.Process(target=_read, args=(self, number, rank, cursor, (deaths or {}).get(rank)))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return self._wait(processes, self._path("log", number, 0), kill_after_lines)
        finally:
            for process in processes:
                process.kill()
                process.join()

    def _wait(self, processes, log, kill_after_lines):
        until = time.monotonic() + 120
        running = {process.sentinel: process for process in processes}
        while running:
            assert time.monotonic() < until, "a rank hangs"
            for sentinel in connection.wait(list(running), timeout=0.005 if kill_after_lines else 1):
                process = running.pop(sentinel)
                process.join()
                assert process.exitcode in (0, -signal.SIGKILL), f"a rank failed with status {process.exitcode}"
                if process.exitcode:
                    return False
            if kill_after_lines and log.is_file() and log.read_bytes().count(b"\n") >= kill_after_lines:
                return False
        return True

    def cursor(self):
        """The last commit that all ranks have behind them."""
        if not self.sizes:
            return Cursor(0)
        paths = [self._path("cursor", len(self.sizes) - 1, rank) for rank in range(self.sizes[-1])]
        if not all(path.is_file() for path in paths):
            return self.firsts[-1]
        return min((Cursor.from_dict(json.loads(path.read_text())) for path in paths), key=lambda one: one.step)

    def entries(self):
        """What the run got, as if it had been one; each sitting is checked: in order, from its cursor on, no gap."""
        found = {}
        ends = [*(cursor.step for cursor in self.firsts[1:]), self.last_step]
        for number, (first, end, world_size) in enumerate(zip(self.firsts, ends, self.sizes, strict=True)):
            assert first.step <= end
            for rank in range(world_size):
                entries = read_entries(self._path("log", number, rank))
                share = NUM_LANES // world_size
                lanes = range(rank * share, (rank + 1) * share)
                assert {lane for _, lane in entries} <= {*lanes}, "the order of the ranks is not that of the lanes"
                steps = list(dict.fromkeys(step for step, _ in entries))
                assert steps == list(range(first.step, first.step + len(steps)))
                assert first.step + len(steps) >= end, "committed, and not in the log"
                found |= {place: entry for place, entry in entries.items() if place[0] < end}
        return found

    def everything(self):
        """All entries of all sittings, those that were made again included."""
        return [
            (place, entry)
            for number, world_size in enumerate(self.sizes)
            for rank in range(world_size)
            for place, entry in read_entries(self._path("log", number, rank)).items()
        ]

    def save(self, number, rank, cursor, dies):
        path = self._path("cursor", number, rank)
        aside = path.with_suffix(".partial")
        text = json.dumps(cursor.to_dict())
        aside.write_text(text[: len(text) // 2])
        dies("save")
        aside.write_text(text)
        aside.rename(path)

    def _path(self, what, number, rank):
        return self.folder / f"{what}-{number}-{rank}"


def undisturbed(root, last_step, **changes):
    """The entries of a run without processes, threads or a loader."""
    maker, plan = open_maker(stream_config(root, **changes))
    found = {}
    for step in range(last_step):
        batch = maker.make(plan, step, range(NUM_LANES))
        found |= {(step, part.first_lane): (part.keys, digest(part)) for part in batch.micro_batches(NUM_LANES)}
    maker.close()
    return found


def _read(run, number, rank, cursor, death):
    dies = _countdown(death)
    _die_in_the_reader(dies)
    folder = run.folder / RECORD_FOLDER
    known = read_failures(folder)
    config = stream_config(run.root, **run.changes)
    maker, plan = open_maker(config, lambda decoder: _Dying(decoder, dies), rank, folder, known)
    run.save(number, rank, cursor, dies)  # straight after it was restored
    loader = Loader(
        maker,
        plan,
        rank=rank,
        world_size=run.sizes[-1],
        first_step=cursor.step,
        last_step=run.last_step,
    )
    with run._path("log", number, rank).open("w") as log:
        for batch in loader:
            write_entries(log, batch)
            dies("step")
            cursor = cursor.after(batch.step)
            if cursor.step % SAVE_EVERY == 0 or cursor.step == run.last_step:
                run.save(number, rank, cursor, dies)
    loader.close()
    maker.close()


def _countdown(death):
    """Kills this process at a certain call for a certain point."""
    point, left = death or ("", 0)

    def dies(here):
        nonlocal left
        left -= here == point
        if here == point and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return dies


def _die_in_the_reader(dies):
    read_clip = alpro_stream.stream.maker.read_clip

    def read_and_die(*arguments):
        dies("reader")
        return read_clip(*arguments)

    alpro_stream.stream.maker.read_clip = read_and_die


class _Dying(Wrapped):
    """A decoder of stored frames that ends its process."""

    def __init__(self, decoder, dies):
        super().__init__(decoder)
        self._dies = dies

    def decode(self, requests, out_NHWC, rows):
        self._dies("decoder")
        return super().decode(requests, out_NHWC, rows)


def arm_stream(point, call):
    """Death of a whole training run in its reader or decoder; for `dying_runs.train_until_death`."""
    dies = _countdown((point, call))
    _die_in_the_reader(dies)
    build = alpro_stream.stream.clips.build_decoder
    alpro_stream.stream.clips.build_decoder = lambda *arguments: _Dying(build(*arguments), dies)


def log_steps(path):
    """Logs every batch that a training run makes a step with; returns what undoes it."""
    train_step = Trainer._train_step

    def logged(self, batch, *rest):
        shares = train_step(self, batch, *rest)
        with path.open("a") as log:
            write_entries(log, batch)
        return shares

    Trainer._train_step = logged
    return lambda: setattr(Trainer, "_train_step", train_step)
