"""The entry of every rank: of `alpro train`, `deepspeed --module alpro_launch.train`, `srun python -m`."""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from alpro_launch.launch_log import logged_in_slurm
from alpro_launch.processes import end_with_parent
from alpro_launch.rank_entry import is_first_rank, leave, run_rank
from alpro_launch.topology import Topology, take_place
from alpro_stream.config import load_config
from alpro_stream.exit_status import INTERRUPTED, PREEMPTED

if TYPE_CHECKING:
    from alpro_stream.run import RunConfig


def main(argv: Sequence[str]) -> int:
    """Trains what the configuration says; returns the exit status, see docs/training.md."""
    # The launcher passes the rank first; it is in the environment too, where `take_place` reads it.
    arguments = [argument for argument in argv if not argument.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m alpro_launch.train CONFIG [key=value ...]", file=sys.stderr)
        return 2
    return run_rank(
        lambda: _train(arguments[0], arguments[1:]),
        lambda: _say_interrupted("interrupted; the same command goes on from the last checkpoint"),
    )


def _end_before_it_began(number: int, _: object) -> None:
    """Not by an exception: what is being imported may catch it."""
    if number == signal.SIGINT:
        _say_interrupted("interrupted before it began")
        os._exit(INTERRUPTED)
    if "LOCAL_WORLD_SIZE" in os.environ:  # Of `alpro train`, which knows whether anybody asked, and says it.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if is_first_rank():
        _say("asked to stop before it began; the same command begins")
    os._exit(PREEMPTED)


def _say_interrupted(text: str) -> None:
    """Once for all ranks: `alpro train` says it for them, and torchrun, whose variable this is too."""
    if is_first_rank() and "LOCAL_WORLD_SIZE" not in os.environ:
        _say(text)


def _say(text: str) -> None:
    with suppress(OSError):  # Nobody reads any more.
        os.write(2, f"{text}\n".encode())  # Not by `print`, which a signal may have interrupted.


def _train(path: str, overrides: Sequence[str]) -> int:
    if "CROSS_RANK" in os.environ:  # The launcher of deepspeed leaves its ranks behind when it is killed.
        end_with_parent()
    # Imported here and not above: the prompter process imports this module again, and needs none of it.
    import torch

    from alpro_stream.run import RunConfig

    config = load_config(RunConfig, path, overrides)
    since = time.monotonic()
    topology = take_place(config.train.timeout_s, "nccl" if torch.cuda.is_available() else "gloo")
    is_first = topology.rank == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if is_first:
        logging.getLogger("alpro_stream").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def work() -> int:
        return _train_at(topology, config, since)

    if is_first and topology.found_in == "Slurm":
        return logged_in_slurm(config.run_dir, topology.num_ranks, os.environ, work)
    return work()


def _train_at(topology: Topology, config: "RunConfig", since: float) -> int:
    from alpro_stream.run import train
    from alpro_stream.train.preemption import STOP_FILE, StopRequest
    from alpro_stream.train.watchdog import end_process

    is_first = topology.rank == 0

    @cache
    def request() -> StopRequest:  # Made when it is first asked: while the ranks wait for each other nothing is saved.
        return StopRequest(config.run_dir / STOP_FILE if is_first else None)

    finished = train(config, lambda: request().asked, end_process, since)
    request().settle()
    if finished.was_stopped:
        if is_first:
            print(f"asked to stop, saved: {finished.checkpoint}; the same command goes on", file=sys.stderr, flush=True)
        return PREEMPTED
    if is_first:
        done = "was trained before, nothing to do" if finished.already_done else "trained"
        print(f"{finished.num_steps} steps {done}: {finished.checkpoint}", flush=True)
    return 0


if __name__ == "__main__":
    # Until there is something to save: importing takes seconds.
    for request_to_end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request_to_end, _end_before_it_began)
    leave(main(sys.argv[1:]))
