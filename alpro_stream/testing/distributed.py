"""A process group on one machine: the same function on every rank, its results, and no process left behind."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]


class RankError(Exception):
    """A rank raised, died or took too long; the message carries its traceback or its exit status."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    preload: Sequence[str] = (),
) -> list[Any]:
    """Calls ``function(*args)`` on every rank of a gloo group, each rank in a process of its own.

    The ranks read their place from `torch.distributed`, or from RANK, LOCAL_RANK and WORLD_SIZE. Each has one
    thread.

    Args:
        function: picklable, so defined at the top of a module; its result is pickled too.
        world_size: number of ranks.
        args: of the function; pickled.
        timeout_s: longest duration of everything together, and of one collective.
        preload: modules that a server imports once and every rank is forked from; without, ranks are spawned.

    Returns:
        The results, by rank.

    Raises:
        RankError: a rank failed, died, or was not done in time. The other ranks are killed.
    """
    # The port is chosen by binding it, here and for as long as it is used: two groups can never meet on it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context: Any = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, store.port, rank, world_size, timeout_s, function, args)
            process = context.Process(target=_run_rank, args=arguments, name=f"rank-{rank}")
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _results(processes, pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _results(processes: list[BaseProcess], pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        missing = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = connection.wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = ", ".join(str(rank) for rank in sorted(missing.values()))
            raise RankError(f"not done in time: rank {ranks} of {len(pipes)}")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = missing[pipe]
            results[rank] = _result(rank, processes[rank], pipe)
    return [results[rank] for rank in range(len(pipes))]


def _result(rank: int, process: BaseProcess, pipe: Connection) -> Any:
    try:
        is_fine, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        raise RankError(f"rank {rank} died with exit status {process.exitcode}") from None
    if not is_fine:
        raise RankError(f"rank {rank} raised:\n{value}")
    return value


def _run_rank(
    pipe: Connection,
    port: int,
    rank: int,
    world_size: int,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    # A machine's own name may have no address, in a container for example.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        # Pickled here: tensors sent as they are would be shared memory that ends with this process.
        answer = pickle.dumps((True, function(*args)))
    except Exception:
        answer = pickle.dumps((False, traceback.format_exc()))
    with suppress(BrokenPipeError):  # Nobody waits any more.
        pipe.send_bytes(answer)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
