"""How the ranks of a run find each other: each says where it is and what it runs, and the first one decides.

torch's own way only counts who came. Here the first rank names those that did not, and compares the programs before any
of them computes something.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from queue import Empty, Queue

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from alpro_stream.errors import AlproError, ConfigError, OtherRankError, RankError

# The others began to wait before or after the first rank did, and hear from it what it found out.
_GRACE_S = 10.0
_KNOCK_S, _POLL_S = 3.0, 0.2
_ANOTHER_LISTENS = "something listens there, but it is not the first rank of this run: another program has the port"
_VERDICT, _HEARD = "verdict", "heard"


@dataclass(frozen=True)
class Caller:
    """What a rank says of itself.

    Attributes:
        host: name of its machine.
        versions: of what must be the same on all ranks, by name.
    """

    host: str
    versions: Mapping[str, str]


def meet(rank: int, num_ranks: int, address: str, port: int, timeout_s: float, versions: Mapping[str, str]) -> Store:
    """Waits until all ranks have come; called on each of them.

    Args:
        rank: of this process.
        num_ranks: that are expected.
        address: of the first rank's machine.
        port: on which the first rank listens.
        timeout_s: longest wait.
        versions: see `Caller`.

    Returns:
        What the process group is made with.

    Raises:
        ConfigError: the port is taken, or the ranks run different versions; of the latter each rank hears.
        RankError: some did not come, or the first one cannot be reached.
    """
    start = time.monotonic()
    # torchrun keeps the port itself, and asks for no other.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_host and (cause := _why_no_connection(address, port, timeout_s)):
        raise _in_vain(rank, address, port, start, cause)
    try:
        store = _open_store(address, port, is_host, timeout_s)
    except (RuntimeError, TimeoutError) as error:
        if is_host:
            raise _cannot_listen(port, error) from error
        raise _in_vain(rank, address, port, start, _ANOTHER_LISTENS) from error
    store = PrefixStore(f"alpro/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if rank == 0:
        store.set("0", json.dumps(asdict(Caller(socket.gethostname(), dict(versions)))))
        error_found = _decide(store, num_ranks, start, timeout_s)
        if error_found:
            store.set(_VERDICT, json.dumps([str(error_found), error_found.fault]))
            _wait_until_heard(store, num_ranks)
            raise error_found
        store.set(_VERDICT, json.dumps(None))
        return store
    try:
        store.set(str(rank), json.dumps(asdict(Caller(socket.gethostname(), dict(versions)))))
        store.wait([_VERDICT], timedelta(seconds=timeout_s + _GRACE_S))
        verdict = json.loads(store.get(_VERDICT))
        if verdict:
            store.add(_HEARD, 1)
    except (DistNetworkError, DistStoreError) as error:
        cause = _why_no_connection(address, port, 0) or "it did not say that all have come"
        raise _in_vain(rank, address, port, start, cause) from error
    if verdict:
        raise OtherRankError(*verdict)
    return store


def _open_store(address: str, port: int, is_host: bool, timeout_s: float) -> Store:
    """The store of the first rank.

    Raises:
        RuntimeError: of torch, when it cannot be made.
        TimeoutError: what listens there does not answer. torch reads from it without a deadline, hence the thread.
    """
    found: Queue[Store | RuntimeError] = Queue()

    def connect() -> None:
        try:
            found.put(TCPStore(address, port, None, is_host, timedelta(seconds=timeout_s), wait_for_workers=False))
        except RuntimeError as error:
            found.put(error)

    threading.Thread(target=connect, name="alpro-rendezvous", daemon=True).start()
    try:
        store = found.get(timeout=timeout_s + _KNOCK_S)
    except Empty:
        raise TimeoutError from None
    if isinstance(store, RuntimeError):
        raise store
    return store


def _decide(store: Store, num_ranks: int, start: float, timeout_s: float) -> AlproError | None:
    """What is wrong with those that have come, after all have or the time is over."""
    left = timedelta(seconds=max(0.1, timeout_s - (time.monotonic() - start)))
    try:
        store.wait([str(rank) for rank in range(num_ranks)], left)
    except DistStoreError:
        there = {rank: _caller(store, rank) for rank in range(num_ranks) if store.check([str(rank)])}
        return RankError(describe_absent(there, num_ranks, timeout_s))
    text = describe_differences([_caller(store, rank) for rank in range(num_ranks)])
    return ConfigError(text) if text else None


def _caller(store: Store, rank: int) -> Caller:
    return Caller(**json.loads(store.get(str(rank))))


def _wait_until_heard(store: Store, num_ranks: int) -> None:
    """The store ends with this process: those that wait for the verdict must have read it."""
    deadline = time.monotonic() + _GRACE_S
    num_others = sum(store.check([str(rank)]) for rank in range(1, num_ranks))
    while time.monotonic() < deadline and store.add(_HEARD, 0) < num_others:
        time.sleep(0.05)


def describe_absent(there: Mapping[int, Caller], num_ranks: int, timeout_s: float) -> str:
    """Which ranks did not come, and where the others are."""
    absent = [rank for rank in range(num_ranks) if rank not in there]
    hosts = sorted({caller.host for caller in there.values()})
    return (
        f"{_ranks(absent)} of {num_ranks} did not come within train.timeout_s={timeout_s:g} s; there "
        f"{'is' if len(there) == 1 else 'are'} {_ranks(sorted(there))} on {', '.join(hosts)}. Look at what the missing "
        "ones printed: they were not started, ended before, or cannot reach the first rank"
    )


def describe_differences(callers: Sequence[Caller]) -> str:
    """How the programs of the ranks differ; empty where they do not."""
    lines = []
    for name in sorted({name for caller in callers for name in caller.versions}):
        found: dict[str, list[int]] = {}
        for rank, caller in enumerate(callers):
            found.setdefault(caller.versions.get(name, "none"), []).append(rank)
        if len(found) > 1:
            places = [
                f"{version} on {', '.join(sorted({callers[rank].host for rank in ranks}))} ({_ranks(ranks)})"
                for version, ranks in found.items()
            ]
            lines.append(f"{name} {' and '.join(places)}")
    return f"the ranks run different programs: {'; '.join(lines)}. Install the same on all" if lines else ""


def _ranks(ranks: Sequence[int]) -> str:
    """Such as ``ranks 0-7, 12``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, run)) for run in runs)}"


def _cannot_listen(port: int, error: Exception) -> ConfigError:
    if "EADDRINUSE" in str(error):
        return ConfigError(
            f"port {port} of {socket.gethostname()}, on which the ranks meet, is taken by another program, perhaps by "
            "another run; set another one on all hosts: --master-port of alpro, --master_port of deepspeed, or "
            "MASTER_PORT"
        )
    return ConfigError(f"cannot listen on port {port} of {socket.gethostname()}: {str(error).splitlines()[0]}")


def _why_no_connection(address: str, port: int, timeout_s: float) -> str:
    """Tries to connect until the time is over; empty where it can. torch would write pages into the log meanwhile."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=_KNOCK_S).close()
            return ""
        except TimeoutError:
            cause = "nothing answers from there: a firewall, another network, or a machine that is down"
        except ConnectionRefusedError:
            cause = "nobody listens there: the first rank was not started, or has ended and its own message says why"
        except OSError as error:
            cause = f"it cannot be reached from {socket.gethostname()} ({error}): is the address right?"
        if time.monotonic() >= deadline:
            return cause
        time.sleep(_POLL_S)


def _in_vain(rank: int, address: str, port: int, start: float, cause: str) -> RankError:
    waited = time.monotonic() - start
    return RankError(f"rank {rank} waited {waited:.0f} s for the first rank at {address}:{port}, in vain: {cause}")
