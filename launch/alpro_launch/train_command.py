"""`alpro train`: on this machine, on those of a hostfile, or on this one among several."""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from alpro_launch.hostfile import num_slots, read_hostfile
from alpro_launch.local_ranks import DEFAULT_PORT, Node, rank_environments, train_command
from alpro_launch.processes import how_ended, run_all, terminated_within
from alpro_launch.restart import BEFORE_IT_BEGAN, Outcome, allowed_ranks, keep_training, tell
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError, ProcessError
from alpro_stream.exit_status import HARDWARE, PREEMPTED

_GOES_ON = "the same command goes on from the last checkpoint"


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Where the ranks are, and how often they are started again."""
    several = add_place_flags(parser)
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="failures without a newer checkpoint that are mended (default 0)"
    )
    several.add_argument("--hostfile", type=Path, help="lines HOST slots=RANKS: start them by deepspeed, over ssh")


def add_place_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where the ranks are; returns the group of flags for several machines."""
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine, one a GPU (default 1)")
    several = parser.add_argument_group("on several machines")
    several.add_argument("--nodes", type=int, default=1, help="give the same command on so many, without ssh")
    several.add_argument("--node-rank", type=int, default=0, help="with --nodes: number of this one, from 0")
    several.add_argument("--master-addr", help="address of the first one, as all of them see it")
    port = f"port there, on which the ranks meet (default {DEFAULT_PORT})"
    several.add_argument("--master-port", type=int, help=port)
    return several


def node_of(arguments: argparse.Namespace) -> Node:
    """What the flags say of this machine."""
    return Node(arguments.nodes, arguments.node_rank, arguments.master_addr, arguments.master_port)


def run_train(path: str, overrides: Sequence[str], arguments: argparse.Namespace) -> Outcome:
    """Trains one configuration; returns how that ended.

    Raises:
        ConfigError: flags, hostfile, configuration and number of ranks do not fit together.
        ProcessError: hosts cannot be reached.
    """
    if arguments.max_restarts < 0:
        raise ConfigError(f"--max-restarts {arguments.max_restarts}: expected 0 or more")
    if arguments.hostfile:
        return _train_on_hosts(path, overrides, arguments)
    ranks, node = arguments.ranks, node_of(arguments)
    launcher = LocalLauncher(path, overrides, ranks, node)
    if not arguments.max_restarts:
        outcome = launcher.launch(ranks)
        tell(outcome)
        return outcome
    from alpro_stream.run import RunConfig

    run_dir = load_config(RunConfig, path, overrides).run_dir
    # All nodes decide alike, as all ranks of a run end with the same status; one of them writes.
    return keep_training(launcher, ranks, [ranks], arguments.max_restarts, run_dir, is_logged=node.node_rank == 0)


class LocalLauncher:
    """Starts the ranks of this machine."""

    def __init__(self, path: str, overrides: Sequence[str], num_ranks: int, node: Node) -> None:
        self._command = train_command(path, overrides)
        self._num_ranks, self._node = num_ranks, node

    def num_slots(self) -> int:
        """All of them: there is no other machine."""
        return self._num_ranks

    def launch(self, num_ranks: int) -> Outcome:
        """Starts the ranks, and waits until they have ended."""
        ended = run_all(self._command, rank_environments(num_ranks, self._node))
        if ended.status == 1:
            cause = (
                "it hung in native code, see logs/stacks-*.txt in the folder of the run, or Python could not start it"
            )
            return Outcome(HARDWARE, f"a rank ended with status 1: {cause}", ended.was_asked)
        if ended.status >= 0:
            return Outcome(ended.status, was_asked=ended.was_asked)
        if ended.status == -signal.SIGTERM:  # So do ranks that have not met, and those that are not to save.
            return Outcome(PREEMPTED, BEFORE_IT_BEGAN, True)
        return Outcome(HARDWARE, f"{how_ended(ended)}; {_GOES_ON}", ended.was_asked)


def _train_on_hosts(path: str, overrides: Sequence[str], arguments: argparse.Namespace) -> Outcome:
    from alpro_launch.deepspeed_launcher import DeepspeedLauncher
    from alpro_stream.run import RunConfig

    if arguments.ranks != 1 or arguments.nodes != 1:
        raise ConfigError("--hostfile says where the ranks are: it goes with neither --ranks nor --nodes")
    hosts = read_hostfile(arguments.hostfile)
    config = load_config(RunConfig, path, overrides)
    num_lanes, num_micro_batches = config.stream.num_lanes, config.train.engine.num_micro_batches
    wanted, allowed = num_slots(hosts), allowed_ranks(num_lanes, num_micro_batches)
    if wanted not in allowed:
        raise ConfigError(
            f"{arguments.hostfile} has {wanted} slots, which do not divide the {num_lanes} lanes of the run in "
            f"{num_micro_batches} micro-batches; allowed numbers of ranks: {', '.join(map(str, allowed))}. Change the "
            "slots, or for a new run stream.num_lanes"
        )
    launcher = DeepspeedLauncher(hosts, config, arguments.master_addr, arguments.master_port or DEFAULT_PORT)
    if launcher.num_slots() < wanted:
        raise ProcessError(
            f"not all hosts of {arguments.hostfile} can be reached, see above: `ssh HOST true` must work from this "
            "machine without a password"
        )
    if terminated_within(0):  # While the hosts were asked.
        asked = Outcome(PREEMPTED, BEFORE_IT_BEGAN, True)
        tell(asked)
        return asked
    return keep_training(launcher, wanted, allowed, arguments.max_restarts, config.run_dir)
