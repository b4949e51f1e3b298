"""How the ranks of a run find each other: each says where it is and what it runs, and the first one decides.

torch's own way only counts who came, and takes a rank of another run for one of this. Here each says which run it
belongs to; the first rank names those that did not come, and compares the programs before any of them computes
something.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]

from alpro_stream.errors import AlproError, ConfigError, OtherRankError, RankError, TakenError
from alpro_stream.train.callers import Caller, describe_absent, describe_differences, in_words
from alpro_stream.train.roll_call import State
from alpro_stream.train.store_calls import in_time, open_store, read, wait

# The others began to wait before or after the first rank did, and hear from it what it found out.
_GRACE_S = 10.0
_KNOCK_S, _POLL_S = 3.0, 0.2
_LOOPBACK = "127.0.0.1"
_ANOTHER_LISTENS = "something listens there, but it is not the first rank of this run: another program has the port"
_NO_ANSWER = (
    "something listens there and does not answer: another program has the port, or the first rank is stopped or cut off"
)
_OTHER_PORT = "--master-port of alpro, --master_port of deepspeed, or MASTER_PORT"
# Told before anything else, outside the prefix of an attempt.
_RUN, _FIRST = "alpro/run", "alpro/first"
_VERDICT, _HEARD = "verdict", "heard"


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
        RankError: some did not come, or the first one cannot be reached, or does not answer.
    """
    own = Caller(socket.gethostname(), dict(versions), secrets.token_hex(8))
    # torchrun keeps the port itself, and asks for no other.
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    root = _listen(meeting, own.token) if rank == 0 and not is_kept else _connect(rank, meeting)
    store = PrefixStore(f"alpro/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", root)
    with _explained(rank, meeting):
        if rank == 0:
            in_time(lambda: root.set(_RUN, meeting.run))
        else:
            _check_is_ours(root, rank, meeting, meeting.left_s if is_kept else min(meeting.left_s, _GRACE_S))
        in_time(lambda: store.set(str(rank), json.dumps(asdict(own))))
        if rank == 0:
            _tell_verdict(store, meeting)
        else:
            _hear_verdict(store, rank, meeting, own)
    return store


@contextmanager
def _explained(rank: int, meeting: Meeting) -> Iterator[None]:
    """Around what is asked of the first rank: says why that failed, where torch or the clock only say that it did."""
    try:
        yield
    except TimeoutError as error:
        raise _in_vain(rank, meeting, f"it {State.SILENT.value}") from error
    except DistNetworkError as error:
        raise _in_vain(rank, meeting, _why_no_connection(meeting) or "the connection to it broke off") from error


def _listen(meeting: Meeting, token: str) -> Store:
    """The store of this process, which is the first rank.

    It is reached by another way than that of the others: torch would try the address for the whole timeout, and write
    pages of its own.
    """
    try:
        root = open_store(_LOOPBACK, meeting.port, True, meeting.timeout_s, _GRACE_S)
    except (RuntimeError, TimeoutError) as error:
        raise _cannot_listen(meeting.port, error) from error
    in_time(lambda: root.set(_FIRST, token))
    if not _leads_to(token, meeting):
        raise RankError(
            f"this is rank 0, but {meeting.place} does not lead here, to {socket.gethostname()}: is it this machine's "
            "address, and is this the machine with --node-rank 0, and the only one? All hosts need the same "
            "--master-addr, and each another --node-rank"
        )
    return root


def _leads_to(token: str, meeting: Meeting) -> bool:
    """Whether the address is that of the process with the token; another machine may be the first one too."""
    if _why_no_connection(meeting, min(meeting.deadline, time.monotonic() + _GRACE_S)):
        return False
    try:
        found = open_store(meeting.address, meeting.port, False, meeting.timeout_s, _GRACE_S)
        return read(found, _FIRST, _GRACE_S) == token
    except (RuntimeError, TimeoutError):
        return False


def _connect(rank: int, meeting: Meeting) -> Store:
    if cause := _why_no_connection(meeting, meeting.deadline):
        raise _in_vain(rank, meeting, cause)
    try:
        seconds = min(meeting.left_s, _GRACE_S) + _KNOCK_S
        return open_store(meeting.address, meeting.port, False, meeting.timeout_s, seconds)
    except TimeoutError as error:
        raise _in_vain(rank, meeting, _NO_ANSWER) from error
    except RuntimeError as error:
        raise _in_vain(rank, meeting, _ANOTHER_LISTENS) from error


def _check_is_ours(root: Store, rank: int, meeting: Meeting, wait_s: float) -> None:
    """Before anything is written: what two runs say in one store, none of them understands."""
    try:
        found = read(root, _RUN, wait_s)
    except DistStoreError as error:
        raise _in_vain(rank, meeting, _ANOTHER_LISTENS) from error
    if found != meeting.run:
        raise TakenError(
            f"another run has {meeting.place}: {found}, and this rank is one of {meeting.run}. Choose another port for "
            f"this run, on all hosts: {_OTHER_PORT}. Where both are meant to be one run, give all hosts the same "
            "command"
        )


def _tell_verdict(store: Store, meeting: Meeting) -> None:
    """Of the first rank: waits for all, and says what it found out."""
    while True:
        with suppress(DistStoreError):  # Who is missing then is asked below.
            wait(store, [str(rank) for rank in range(meeting.num_ranks)], meeting.left_s)
        there = _there(store, meeting.num_ranks)
        # One that had come may have given up before the last one came.
        if len(there) == meeting.num_ranks or time.monotonic() >= meeting.deadline:
            break
    error = _judge(there, meeting)
    tokens = [caller.token for caller in there.values()]
    verdict = json.dumps({"error": [str(error), error.fault] if error else None, "tokens": tokens})
    in_time(lambda: store.set(_VERDICT, verdict))
    if error:
        with suppress(TimeoutError):
            in_time(lambda: _wait_until_heard(store, meeting.num_ranks), _GRACE_S + _KNOCK_S)
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
        verdict = json.loads(read(store, _VERDICT, meeting.left_s + _GRACE_S))
    except DistStoreError as error:
        there = sorted(_there(store, meeting.num_ranks))
        # The first rank may wait longer, and must not count on this one.
        in_time(lambda: store.delete_key(str(rank)))
        raise _in_vain(rank, meeting, f"only {in_words(there)} of {meeting.num_ranks} have come") from error
    if verdict["error"]:
        in_time(lambda: store.add(_HEARD, 1))
        raise OtherRankError(*verdict["error"])
    if own.token not in verdict["tokens"]:
        raise TakenError(
            f"another process is rank {rank} of {meeting.run} already, which meets at {meeting.place}: it was started "
            "twice, or ranks of its last attempt are still ending. Wait until they have ended"
        )


def _there(store: Store, num_ranks: int) -> dict[int, Caller]:
    """Those that have come, by rank."""

    def ask() -> dict[int, Caller]:
        ranks = [rank for rank in range(num_ranks) if store.check([str(rank)])]
        return {rank: Caller.from_json(json.loads(store.get(str(rank)))) for rank in ranks}

    return in_time(ask)


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
