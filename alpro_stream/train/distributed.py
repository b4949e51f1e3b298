"""Ranks: which one this is, and the few collectives the training needs."""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from alpro_stream.errors import AlproError, ConfigError, Fault, OtherRankError, RankError
from alpro_stream.exit_status import fault_of
from alpro_stream.train.rendezvous import Meeting, meet
from alpro_stream.train.roll_call import RollCall
from alpro_stream.train.stage import Stage

T = TypeVar("T")

# NCCL ends the process at its deadline, without a word of ours. The watchdog waits up to 15 s behind the others'
# deadline, and then writes stacks: until then a rank must have ended with the error that names what it waited for.
_NCCL_LATER_S = 30.0


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of a run.

    Attributes:
        rank: of this process, over all nodes.
        local_rank: on this node.
        size: number of ranks.
        device: where its tensors live.
        control: group for what ranks tell each other on their CPUs; None is the default group.
        timeout_s: longest wait for the others, for messages.
        timeout_name: of the setting that it is; empty where nobody can set it.
        roll_call: finds out which rank is missing; None where nobody can be asked.
        stage: what this rank does now.

    What a rank does with the others raises an AlproError when they are gone or not there in time.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    timeout_s: float = 600.0
    timeout_name: str = ""
    roll_call: RollCall | None = None
    stage: Stage = field(default_factory=Stage)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, concatenated by global rank; carries no gradient."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.waiting("the tensors of all ranks"):
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks."""
        if self.size > 1:
            with self.waiting("the sums of all ranks"):
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            with self.waiting("all ranks to come to the same place"):
                dist.barrier()

    def any(self, value: bool) -> bool:
        """Whether it is so on some rank; all ranks must ask."""
        if self.size == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32)
        with self.waiting("what all ranks say"):
            dist.all_reduce(flag, group=self.control)
        return bool(flag.item())

    def all_same(self, value: str) -> bool:
        """Whether every rank gives the same value; all ranks must ask."""
        digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "big")
        digests = self.gather(torch.tensor([digest], device=self.device))
        return bool((digests == digest).all())

    def from_first(self, make: Callable[[], T], what: str = "what it makes for all") -> T:
        """What a function gives on the first rank, on every rank; the others do not call it. All ranks must ask.

        Args:
            make: called on the first rank.
            what: what that is, for the error of a rank that waits in vain.

        Raises:
            AlproError: it failed; raised on every rank.
        """
        values: list[Any] = [None]
        with self.all_or_none(f"rank 0 and {what}"):
            if self.is_first:
                values = [make()]
        if self.size > 1:
            with self.waiting(f"rank 0 and {what}"):
                dist.broadcast_object_list(values, src=0, group=self.control)
        made: T = values[0]
        return made

    @contextmanager
    def all_or_none(self, what: str = "all ranks to be ready") -> Iterator[None]:
        """What is inside succeeds on every rank or every rank raises: nobody waits for a rank that gave up.

        Entered by all ranks; nothing inside may wait for another rank. A rank that failed raises its own error.

        Args:
            what: what is waited for, for the error of a rank that waits in vain.

        Raises:
            OtherRankError: another rank failed; carries that rank's message.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            if self.size > 1:
                self._vote(failure, what)
        except AlproError:
            if failure is None:  # else its own error tells more than that the others are gone
                raise
        if failure is not None:
            raise failure

    def _vote(self, failure: Exception | None, what: str) -> None:
        failures: list[tuple[str, Fault] | None] = [None] * self.size
        with self.waiting(what):
            num_failed = torch.tensor([failure is not None], dtype=torch.int32)
            dist.all_reduce(num_failed, group=self.control)
            if not num_failed.item():
                return
            own = None if failure is None else (_text(failure), fault_of(failure))
            dist.all_gather_object(failures, own, group=self.control)
        if failure is None:
            found = {rank: theirs for rank, theirs in enumerate(failures) if theirs}
            text = "; ".join(f"rank {rank} failed: {text}" for rank, (text, _) in found.items())
            raise OtherRankError(text, next(fault for _, fault in found.values()))

    @contextmanager
    def waiting(self, what: str, *, at_work: bool = False) -> Iterator[None]:
        """Around what waits for other ranks: says which of them is missing, where the process group only fails.

        Args:
            what: what is waited for.
            at_work: this rank computes too, and may be the one that the others wait for.

        Raises:
            RankError: a rank is gone, or not there in time.
        """
        start = time.monotonic()
        if self.roll_call and not at_work:
            self.roll_call.waiting = True
        try:
            yield
        except RuntimeError as error:
            if not _is_of_a_group(error):
                raise
            waited, at = time.monotonic() - start, self.stage.now[0]
            self.stage.enter("the question which rank is missing")
            absent = self.roll_call.absent(self.rank) if self.roll_call else ""
            cause = absent or (
                f"another rank was ended, or took longer than {self.timeout_s:g} s"
                f"{f'. If none of them says why, raise {self.timeout_name}' if self.timeout_name else ''}"
            )
            raise RankError(
                f"rank {self.rank} of {self.size} waited {waited:.0f} s for {what} at {at}, in vain: {cause} "
                f"({str(error).partition(chr(10))[0]})"
            ) from error
        if self.roll_call and not at_work:
            self.roll_call.waiting = False


def join_world(
    timeout_s: float,
    versions: Mapping[str, str] = MappingProxyType({}),
    run: str = "a run",
    since: float | None = None,
    timeout_name: str = "",
) -> World:
    """Joins the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Without those variables the process is a world of its own. NCCL is used on GPUs, gloo on CPUs. A process
    group that exists already is used as it is.

    Args:
        timeout_s: longest wait for the other ranks, now and later.
        versions: of what must be the same on all ranks, by name.
        run: what tells this run from others that may have the same port, in words; equal on all its ranks.
        since: when this process began to wait for them, by `time.monotonic`; None is now.
        timeout_name: of the setting that `timeout_s` is; empty where nobody can set it.

    Raises:
        ConfigError: some of the variables are set and some are missing; versions differ.
        TakenError: another program or another run has the port.
        RankError: ranks did not come.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    _limit_groups(timeout_s)
    stage = Stage()
    try:
        if not dist.is_initialized():
            meeting = Meeting(
                f"{run} with {world_size} ranks",
                world_size,
                os.environ.get("MASTER_ADDR", ""),
                int(os.environ.get("MASTER_PORT", "0")),
                timeout_s,
                time.monotonic() if since is None else since,
            )
            _start_group("nccl" if on_gpu else "gloo", rank, meeting, versions)
        # DeepSpeed insists on the variable, also where there is one rank and no launcher.
        os.environ["LOCAL_RANK"] = str(local_rank)
        # Votes through NCCL would make every step wait for the GPU.
        control = dist.new_group(backend="gloo") if on_gpu and world_size > 1 else None
        roll_call = _begin_roll_call(stage, dist.get_world_size(), control) if dist.get_world_size() > 1 else None
    except RuntimeError as error:
        if not _is_of_a_group(error):
            raise
        raise RankError(
            f"rank {rank} of {world_size} met the others, and then could not reach them all: a rank ended, or "
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')} is not the interface between the machines "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    size = dist.get_world_size()
    return World(dist.get_rank(), local_rank, size, device, control, timeout_s, timeout_name, roll_call, stage)


def _limit_groups(timeout_s: float) -> None:
    """Gives the deadline to the process groups that exist and to those made later.

    DeepSpeed makes some and waits in them at once; with torch's own default that would be for 10 or 30 minutes.
    """
    c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s + _NCCL_LATER_S)  # type: ignore[attr-defined]
    for group, (backend, _) in c10d._world.pg_map.items():
        c10d._set_pg_timeout(c10d._get_default_timeout(c10d.Backend(backend)), group)


def _start_group(backend: str, rank: int, meeting: Meeting, versions: Mapping[str, str]) -> None:
    if meeting.num_ranks == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {meeting.num_ranks} but {', '.join(missing)} is not set; start ranks with a launcher"
        )
    store = meet(rank, meeting, versions)
    dist.init_process_group(backend, store=store, rank=rank, world_size=meeting.num_ranks)


def _begin_roll_call(stage: Stage, size: int, control: dist.ProcessGroup | None) -> RollCall:
    roll_call = RollCall(stage)
    places: list[Any] = [None] * size
    dist.all_gather_object(places, (roll_call.address, socket.gethostname()), group=control)
    roll_call.addresses = [address for address, _ in places]
    hosts = [host for _, host in places]
    if len({*hosts}) > 1:
        roll_call.hosts = dict(enumerate(hosts))
    return roll_call


def _is_of_a_group(error: RuntimeError) -> bool:
    """Whether a process group failed; those of gloo have no class of their own."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("/gloo/", "pair closure"))


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, AlproError) else f"{type(error).__name__}: {error}"
