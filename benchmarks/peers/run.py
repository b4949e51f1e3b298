"""Runs one peer as its users would, and tells how fast it makes batches.

Run by the peers' own python, see README.md::

    run.py prepare --source VIDEOS --shards SHARDS --data FOLDER
    run.py PEER --data FOLDER --seconds 5
    run.py PEER --data FOLDER --serve
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from options import Options
from process_tree import ProcessTree

# Threads of torch that spin while they wait take the cores from the workers. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NOT_INSTALLED = 3
"""Exit status where the peer's library is missing."""


def decord() -> Any:
    from video_files import batches, read_decord

    return lambda options: batches(options, "videos", read_decord)


def decord_3fps() -> Any:
    from video_files import batches, read_decord

    return lambda options: batches(options, "videos_3fps", read_decord)


def torchcodec() -> Any:
    from video_files import batches, read_torchcodec

    return lambda options: batches(options, "videos_3fps", read_torchcodec)


def torchcodec_files() -> Any:
    from video_files import batches, read_torchcodec

    return lambda options: batches(options, "videos", read_torchcodec)


def webdataset_pil() -> Any:
    from clips import pil
    from webdataset_tars import batches

    return lambda options: batches(options, pil)


def webdataset_turbo() -> Any:
    from clips import turbo
    from webdataset_tars import batches

    return lambda options: batches(options, turbo)


def mosaic() -> Any:
    from mosaic_shards import batches

    return batches


def energon() -> Any:
    from energon_tars import batches

    return batches


# Each imports its library only when it is the one asked for: they are slow to import, and may be missing.
PEERS = {
    "decord": decord,
    "decord-3fps": decord_3fps,
    "torchcodec": torchcodec,
    "torchcodec-files": torchcodec_files,
    "webdataset-pil": webdataset_pil,
    "webdataset-turbo": webdataset_turbo,
    "mosaic": mosaic,
    "energon": energon,
}


class Runner:
    """Takes batches of a peer for some seconds at a time; its workers stand still in between.

    They are stopped in the middle of what they do and go on from there. Without that they would fill their queues
    while others are measured, and the first batches of each sample would cost nothing.
    """

    def __init__(self, batches: Iterator[Any], workers: int) -> None:
        self.batches = batches
        # Workers deliver in turn: after each has given one, all are about as far as when the sample began.
        self.turn = max(1, workers)
        for _ in range(3 * self.turn):
            self.batch_shape = list(next(batches).shape)
        self.tree = ProcessTree()
        self.tree.pause_workers()

    def sample(self, seconds: float) -> dict[str, Any]:
        """Takes batches for at least so many seconds, and returns what is to be printed."""
        before = self.tree.usage()
        num_clips = 0
        self.tree.resume_workers()
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            for _ in range(self.turn):
                num_clips += len(next(self.batches))
        self.tree.pause_workers()
        after = self.tree.usage()
        return {
            "clips_per_s": num_clips / elapsed,
            "cpu_s_per_clip": (after.cpu_s - before.cpu_s) / num_clips,
            "bytes_read_per_clip": (after.read_bytes - before.read_bytes) / num_clips,
            "memory_mb": self.tree.peak_memory_bytes() / 1e6,
            "num_clips": num_clips,
            "batch_shape": self.batch_shape,
        }


def serve(runner: Runner, answers: TextIO) -> None:
    """Answers each line `go SECONDS` of the standard input with a line of JSON, until the input ends."""
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        word, _, seconds = line.strip().partition(" ")
        if word != "go":
            raise SystemExit(f"got the line {line.strip()!r}; expected `go SECONDS`")
        print(json.dumps(runner.sample(float(seconds))), file=answers, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="PEER", choices=["prepare", *PEERS], help=f"prepare, {', '.join(PEERS)}")
    parser.add_argument("--data", type=Path, required=True, help="folder that `prepare` makes")
    parser.add_argument("--source", type=Path, help="prepare: the videos that the shards were made of")
    parser.add_argument("--shards", type=Path, help="prepare: what `alpro shard` wrote")
    parser.add_argument("--clips", type=int, default=4096, help="clips an epoch, repeated to reach it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", action="store_true", help="take samples when told to on the standard input")
    arguments = parser.parse_args(argv)
    if arguments.what == "prepare" and not (arguments.source and arguments.shards):
        parser.error("prepare needs --source and --shards")
    if arguments.what != "prepare" and not arguments.data.is_dir():
        parser.error(f"{arguments.data} is no folder; make it with `run.py prepare`")
    if arguments.clips < arguments.batch:
        parser.error(f"--clips {arguments.clips} is less than a batch of {arguments.batch}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    # Libraries print to the standard output; it is for the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if arguments.what == "prepare":
        from prepare import prepare

        prepare(arguments.source, arguments.shards, arguments.data)
        return 0
    try:
        batches = PEERS[arguments.what]()
    except ModuleNotFoundError as error:
        print(f"{arguments.what}: not installed ({error}); run `make peers`", file=sys.stderr)
        return NOT_INSTALLED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = Options(**{name: getattr(arguments, name) for name in Options.__slots__})
    try:
        runner = Runner(iter(batches(options)), options.workers)
        if arguments.serve:
            serve(runner, answers)
        else:
            print(json.dumps(runner.sample(arguments.seconds)), file=answers, flush=True)
    finally:
        # A process that is stopped does not end.
        ProcessTree().resume_workers()
    return 0


if __name__ == "__main__":
    sys.exit(main())
