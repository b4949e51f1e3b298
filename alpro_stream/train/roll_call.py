"""Which rank is missing: each rank answers the others on a socket of its own, also while it trains.

A collective that fails tells that some rank is gone or late, not which. The process group cannot be asked: its store
ends with the first rank. A thread answers here as long as its process lives and runs.
"""

import errno
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from ipaddress import ip_address
from types import MappingProxyType
from typing import NamedTuple

from alpro_stream.train.stage import Stage

# A thread has no say for as long as a call into C holds the interpreter's lock.
_PATIENCE_S = 3.0
# Ranks that wait for the same one lose patience one shortly after the other, and whoever ends first must not be taken
# for the cause by the next.
_LINGER_S = 5.0
_POLL_S = 0.1
# What the system says of a machine that is off the network; a process that has ended refuses the connection.
_CUT_OFF = (errno.EHOSTUNREACH, errno.ENETUNREACH)
_MOST_BYTES = 300
# Of no machine (TEST-NET-1, RFC 5737): it takes the way to all those that have no way of their own.
_ANOTHER_MACHINE = ("192.0.2.1", 1)


class State(Enum):
    """What a rank that was asked does; the value is what is said of it."""

    WAITING = "waits too"
    BUSY = "is at work and not there yet; raise train.timeout_s if it is only slow"
    SILENT = "does not answer: it is stopped, or its machine hangs or is cut off"
    GONE = "has ended: it was killed (out of memory, perhaps), or its own message says why"


class Answer(NamedTuple):
    """What a rank that was asked said.

    Attributes:
        state: what it does.
        stage: at what, and for how long; empty if it did not say.
    """

    state: State
    stage: str = ""


def describe(answers: Mapping[int, Answer], hosts: Mapping[int, str] = MappingProxyType({})) -> str:
    """Who is missing and why; empty where all ranks that were asked wait.

    Args:
        answers: of the other ranks.
        hosts: where they run, as far as it is known.
    """
    states = {answer.state for answer in answers.values()}
    # Where some are gone, those at work are merely about to notice.
    worst = (State.GONE, State.SILENT) if {State.GONE, State.SILENT} & states else (State.BUSY,)
    return "; ".join(
        f"rank {rank}{f' on {hosts[rank]}' if rank in hosts else ''} {state.value}{f' (at {stage})' if stage else ''}"
        for rank, (state, stage) in sorted(answers.items())
        if state in worst
    )


class RollCall:
    """Answers other ranks until the process ends, and asks them.

    Attributes:
        address: where this one is asked, as (host, port).
        addresses: of all ranks, by rank; given once they are known.
        hosts: names of their machines, by rank, where there are several.
        waiting: whether this rank waits for the others, which is its answer.

    Args:
        stage: what this rank does, for its answers.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        # Reached as the first rank reaches it; no other network sees the port.
        host = own_host(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.addresses: Sequence[tuple[str, int]] = ()
        self.hosts: Mapping[int, str] = {}
        self.waiting = False
        self._asked_by: set[int] = set()
        threading.Thread(target=self._answer, name="roll-call", daemon=True).start()

    def absent(self, rank: int) -> str:
        """Asks all others, after a collective has failed; see `describe`.

        Args:
            rank: of this process.
        """
        self.waiting = True
        others = [other for other in range(len(self.addresses)) if other != rank]
        until = time.monotonic() + _LINGER_S
        with ThreadPoolExecutor(max_workers=32) as pool:
            answers = dict(zip(others, pool.map(lambda other: ask(self.addresses[other], rank), others), strict=True))
            while time.monotonic() < until:
                # Those that are there and have not asked: about to notice, or what the others wait for.
                late = [other for other in others if answers[other].state in (State.WAITING, State.BUSY)]
                late = [other for other in late if other not in self._asked_by]
                if not late:
                    break
                time.sleep(_POLL_S)
                busy = [other for other in late if answers[other].state == State.BUSY]
                again = zip(busy, pool.map(lambda other: ask(self.addresses[other], rank), busy), strict=True)
                # One that was at work, then came too late and ended for it, is the cause as one at work.
                answers |= {other: answer for other, answer in again if answer.state != State.GONE}
        return describe(answers, self.hosts)

    def _answer(self) -> None:
        while True:
            # One that asked and is gone again must not end the thread.
            with suppress(OSError, ValueError):
                connection, _ = self._socket.accept()
                with connection:
                    connection.settimeout(_PATIENCE_S)
                    self._asked_by.add(int(connection.recv(16)))
                    state = State.WAITING if self.waiting else State.BUSY
                    connection.sendall(f"{state.name} {self._stage}".encode()[:_MOST_BYTES])


def ask(address: tuple[str, int], rank: int) -> Answer:
    """What the rank behind an address says to this one, or why it says nothing."""
    try:
        with socket.create_connection(address, timeout=_PATIENCE_S) as connection:
            connection.sendall(str(rank).encode())
            name, _, stage = connection.recv(_MOST_BYTES).decode(errors="replace").partition(" ")
    except TimeoutError:
        return Answer(State.SILENT)
    except OSError as error:
        return Answer(State.SILENT if error.errno in _CUT_OFF else State.GONE)
    return Answer(State[name], stage) if name else Answer(State.GONE)


def own_host(other: str) -> str:
    """The address of this machine from which another one is reached; nothing is sent.

    Raises:
        OSError: the other one has no address, or there is no way to it.
    """
    family, kind, _, _, address = socket.getaddrinfo(other, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        own = str(probe.getsockname()[0])
        if other in ("localhost", address[0]) or not ip_address(own).is_loopback:
            return own
    # Debian gives a machine's own name an address of its loopback, and no other machine reaches that.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(_ANOTHER_MACHINE)
        return str(probe.getsockname()[0])
    return own
