"""How the ranks of a run find each other: each says where it is and what it runs, and the first one decides.

torch's own way only counts who came, and takes a rank of another run for one of this. Here each says which run it
belongs to; the first rank names those that did not come, and compares the programs before any of them computes
something.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from queue import Empty, Queue

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from alpro_stream.errors import AlproError, ConfigError, OtherRankError, RankError, TakenError
from alpro_stream.train.callers import Caller, describe_absent, describe_differences, in_words

# The others began to wait before or after the first rank did, and hear from it what it found out.
_GRACE_S = 10.0
_KNOCK_S, _POLL_S = 3.0, 0.2
_ANOTHER_LISTENS = "something listens there, but it is not the first rank of this run: another program has the port"
_OTHER_PORT = "--master-port of alpro, --master_port of deepspeed, or MASTER_PORT"
# The run is told before anything else, outside the prefix of an attempt.
_RUN, _VERDICT, _HEARD = "alpro/run", "verdict", "heard"


@dataclass(frozen=True)
class Meeting:
    """Whom the ranks of a run wait for, where, and how long.

    Attributes:
        run: what tells this run from others, in words; the same on each of its ranks.
        num_ranks: that are expected.
        address: of the first rank's machine.
        port: on which the first rank listens.
        timeout_s: longest wait, for everything together.
        since: when this process began to wait, by `time.monotonic`.
    """

    run: str
    num_ranks: int
    address: str
    port: int
    timeout_s: float
    since: float

    @property
    def place(self) -> str:
        """Where the first rank listens."""
        return f"{self.address}:{self.port}"

    @property
    def deadline(self) -> float:
        """When the wait is over, by `time.monotonic`."""
        return self.since + self.timeout_s

    @property
    def left_s(self) -> float:
        """Seconds until the wait is over; some are left at its end, for what is there at once."""
        return max(0.1, self.deadline - time.monotonic())


def meet(rank: int, meeting: Meeting, versions: Mapping[str, str]) -> Store:
    """Waits until all ranks have come; called on each of them.

    Args:
        rank: of this process.
        meeting: the same on all ranks, but for its begin.
        versions: see `Caller`.

    Returns:
        What the process group is made with.

    Raises:
        ConfigError: the ranks run different versions; each of them hears of it.
        TakenError: another program or another run has the port, or another process is this rank.
        RankError: some did not come, or the first one cannot be reached.
    """
    # torchrun keeps the port itself, and asks for no other.
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    root = _listen(meeting) if rank == 0 and not is_kept else _connect(rank, meeting)
    if rank == 0:
        root.set(_RUN, meeting.run)
    else:
        _check_is_ours(root, rank, meeting, meeting.left_s if is_kept else min(meeting.left_s, _GRACE_S))
    store = PrefixStore(f"alpro/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", root)
    own = Caller(socket.gethostname(), dict(versions), secrets.token_hex(8))
    store.set(str(rank), json.dumps(asdict(own)))
    if rank == 0:
        _tell_verdict(store, meeting)
    else:
        _hear_verdict(store, rank, meeting, own)
    return store


def _listen(meeting: Meeting) -> Store:
    try:
        return _open_store(meeting, is_host=True)
    except (RuntimeError, TimeoutError) as error:
        raise _cannot_listen(meeting.port, error) from error


def _connect(rank: int, meeting: Meeting) -> Store:
    if cause := _why_no_connection(meeting, meeting.deadline):
        raise _in_vain(rank, meeting, cause)
    try:
        return _open_store(meeting, is_host=False)
    except (RuntimeError, TimeoutError) as error:
        raise _in_vain(rank, meeting, _ANOTHER_LISTENS) from error


def _open_store(meeting: Meeting, is_host: bool) -> Store:
    """The store of the first rank.

    Raises:
        RuntimeError: of torch, when it cannot be made.
        TimeoutError: what listens there does not answer. torch reads from it without a deadline, hence the thread.
    """
    found: Queue[Store | RuntimeError] = Queue()
    # Not what is left of it: the process group waits with it later.
    timeout = timedelta(seconds=meeting.timeout_s)

    def connect() -> None:
        try:
            found.put(TCPStore(meeting.address, meeting.port, None, is_host, timeout, wait_for_workers=False))
        except RuntimeError as error:
            found.put(error)

    threading.Thread(target=connect, name="alpro-rendezvous", daemon=True).start()
    try:
        store = found.get(timeout=meeting.left_s + _KNOCK_S)
    except Empty:
        raise TimeoutError from None
    if isinstance(store, RuntimeError):
        raise store
    return store


def _wait(store: Store, keys: list[str], seconds: float) -> None:
    """Until the store has all keys.

    In a thread: in torch the main thread would not hear of a signal, such as the request to end, before it is over.

    Raises:
        RuntimeError: of torch, when it does not have them in time.
    """
    over: Future[None] = Future()

    def wait() -> None:
        try:
            store.wait(keys, timedelta(seconds=seconds))
            over.set_result(None)
        except RuntimeError as error:
            over.set_exception(error)

    threading.Thread(target=wait, name="alpro-rendezvous", daemon=True).start()
    over.result()


def _check_is_ours(root: Store, rank: int, meeting: Meeting, wait_s: float) -> None:
    """Before anything is written: what two runs say in one store, none of them understands."""
    try:
        _wait(root, [_RUN], wait_s)
        found = root.get(_RUN).decode()
    except (DistNetworkError, DistStoreError) as error:
        raise _in_vain(rank, meeting, _why_no_connection(meeting) or _ANOTHER_LISTENS) from error
    if found != meeting.run:
        raise TakenError(
            f"another run has {meeting.place}: {found}, and this rank is one of {meeting.run}. Choose another port for "
            f"this run, on all hosts: {_OTHER_PORT}. Where both are meant to be one run, give all hosts the same "
            "command"
        )


def _tell_verdict(store: Store, meeting: Meeting) -> None:
    """Of the first rank: waits for all, and says what it found out."""
    with suppress(DistStoreError):  # Who is missing then is asked below.
        _wait(store, [str(rank) for rank in range(meeting.num_ranks)], meeting.left_s)
    there = _there(store, meeting.num_ranks)
    error = _judge(there, meeting)
    tokens = [caller.token for caller in there.values()]
    store.set(_VERDICT, json.dumps({"error": [str(error), error.fault] if error else None, "tokens": tokens}))
    if error:
        _wait_until_heard(store, meeting.num_ranks)
        raise error


def _judge(there: Mapping[int, Caller], meeting: Meeting) -> AlproError | None:
    """What is wrong with those that have come."""
    if len(there) < meeting.num_ranks:
        return RankError(describe_absent(there, meeting.num_ranks, meeting.timeout_s))
    text = describe_differences([*there.values()])
    return ConfigError(text) if text else None


def _hear_verdict(store: Store, rank: int, meeting: Meeting, own: Caller) -> None:
    """Of the others."""
    try:
        _wait(store, [_VERDICT], meeting.left_s + _GRACE_S)
        verdict = json.loads(store.get(_VERDICT))
        if verdict["error"]:
            store.add(_HEARD, 1)
    except DistStoreError as error:
        there = sorted(_there(store, meeting.num_ranks))
        raise _in_vain(rank, meeting, f"only {in_words(there)} of {meeting.num_ranks} have come") from error
    except DistNetworkError as error:
        cause = _why_no_connection(meeting) or "it did not say that all have come"
        raise _in_vain(rank, meeting, cause) from error
    if verdict["error"]:
        raise OtherRankError(*verdict["error"])
    if own.token not in verdict["tokens"]:
        raise TakenError(
            f"another process is rank {rank} of {meeting.run} already, which meets at {meeting.place}: it was started "
            "twice, or ranks of its last attempt are still ending. Wait until they have ended"
        )


def _there(store: Store, num_ranks: int) -> dict[int, Caller]:
    """Those that have come, by rank."""
    ranks = [rank for rank in range(num_ranks) if store.check([str(rank)])]
    return {rank: Caller(**json.loads(store.get(str(rank)))) for rank in ranks}


def _wait_until_heard(store: Store, num_ranks: int) -> None:
    """The store ends with this process: those that wait for the verdict must have read it."""
    deadline = time.monotonic() + _GRACE_S
    num_others = sum(store.check([str(rank)]) for rank in range(1, num_ranks))
    while time.monotonic() < deadline and store.add(_HEARD, 0) < num_others:
        time.sleep(0.05)


def _cannot_listen(port: int, error: Exception) -> AlproError:
    host = socket.gethostname()
    if "EADDRINUSE" in str(error):
        return TakenError(
            f"port {port} of {host}, on which the ranks meet, is taken by another program, by another run, or by a "
            f"rank that is still ending; wait for it, or set another one on all hosts: {_OTHER_PORT}"
        )
    # Not of the configuration: the other ranks see only that nobody listens, and all end with the same status.
    return RankError(f"cannot listen on port {port} of {host}: {(str(error).splitlines() or ['no answer'])[0]}")


def _why_no_connection(meeting: Meeting, deadline: float = 0.0) -> str:
    """Tries to connect until the time is over; empty where it can. torch would write pages into the log meanwhile."""
    while True:
        try:
            socket.create_connection((meeting.address, meeting.port), timeout=_KNOCK_S).close()
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


def _in_vain(rank: int, meeting: Meeting, cause: str) -> RankError:
    waited = time.monotonic() - meeting.since
    return RankError(f"rank {rank} waited {waited:.0f} s for the first rank at {meeting.place}, in vain: {cause}")
