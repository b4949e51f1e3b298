"""The entry of every rank: `deepspeed --module alpro_launch.train CONFIG key=value`, or `python -m` for one rank."""

import logging
import os
import sys
from collections.abc import Sequence

from alpro_stream.config import load_config
from alpro_stream.errors import AlproError


def main(argv: Sequence[str]) -> int:
    """Trains what the configuration says; returns the exit status, see docs/training.md."""
    # Imported here and not above: the prompter process imports this module again, and needs none of it.
    from alpro_stream.run import RunConfig, train
    from alpro_stream.train.preemption import EXIT_PREEMPTED, StopRequest

    # The launcher passes the rank first; it is in the environment too, where `join_world` reads it.
    arguments = [argument for argument in argv if not argument.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m alpro_launch.train CONFIG [key=value ...]", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("alpro_stream").setLevel(logging.INFO)
    try:
        config, request = load_config(RunConfig, arguments[0], arguments[1:]), StopRequest()
        finished = train(config, lambda: request.asked)
    except (AlproError, OSError) as error:  # A folder that cannot be written, a full disk: the system says it.
        print(f"{_rank_prefix()}error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        return 130
    if finished.was_stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"asked to stop, saved: {finished.checkpoint}; the same command goes on", file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    if os.environ.get("RANK", "0") == "0":
        done = "was trained before, nothing to do" if finished.already_done else "trained"
        print(f"{finished.num_steps} steps {done}: {finished.checkpoint}", flush=True)
    return 0


def _rank_prefix() -> str:
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
