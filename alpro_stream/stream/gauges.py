"""What each stage of the loader does, and one line that names what holds the training up."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Literal, get_args

Stage = Literal["fetch", "read", "text", "decode"]
"""fetch: waiting until a remote shard is in the cache; read: members out of shards, with those waits; text: captions to
tokens; decode: bytes to pixels."""
Count = Literal["fetched_bytes", "storage_bytes", "frames", "clips", "quarantined", "fallbacks"]
Queue = Literal["ready", "lookahead"]
"""ready: batches that wait for the step; lookahead: batches that the trainer
holds while the prompter labels them."""

_MB = 1e6
_NOTABLE_WAIT = 5.0
"""Percent of the step below which a wait is not worth a change."""
_BUSY = 50.0
"""Percent of the time from which on a stage may hold the others up."""
_NAMES: dict[Stage, str] = {"fetch": "fetching", "read": "reading", "text": "tokenising", "decode": "decoding"}
_REMEDIES: dict[Stage, str] = {
    "fetch": "raise stream.cache.num_fetches, or move the shards nearer or to a faster network",
    "read": "put the shards on a faster disk, such as one of the node's own",
    "text": "give each rank more CPU cores, and set TOKENIZERS_PARALLELISM=true in its environment",
    "decode": "raise stream.decode.num_workers (num_processes for whole videos), or decode on the GPU with "
    "stream.decode.device=mixed",
}


class Gauges:
    """Figures of the loader since the last `lap`; any thread may report to them.

    Args:
        clock: seconds that only go up.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lap_began = clock()
        self._seconds: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        # How many threads are in a stage now, and since when there is one.
        self._inside: dict[Stage, int] = dict.fromkeys(get_args(Stage), 0)
        self._since: dict[Stage, float] = {}
        self._counts: dict[Count, int] = dict.fromkeys(get_args(Count), 0)
        self._waiting: dict[Queue, int] = dict.fromkeys(get_args(Queue), 0)
        self._most_waiting = 0

    @contextmanager
    def busy(self, stage: Stage) -> Iterator[None]:
        """A stage works inside the `with` block; several threads in it at once count as one."""
        with self._lock:
            if self._inside[stage] == 0:
                self._since[stage] = self._clock()
            self._inside[stage] += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside[stage] -= 1
                if self._inside[stage] == 0:
                    self._seconds[stage] += self._clock() - self._since.pop(stage)

    def count(self, name: Count, amount: int) -> None:
        """Adds what was done since the last call."""
        with self._lock:
            self._counts[name] += amount

    def queue(self, name: Queue, num_bytes: int) -> None:
        """Bytes that wait in a queue from now on."""
        with self._lock:
            self._waiting[name] = num_bytes
            self._most_waiting = max(self._most_waiting, sum(self._waiting.values()))

    def lap(self) -> dict[str, float]:
        """Figures of the time since the last call, and begins anew.

        Returns:
            ``stream/fetched_mb_per_s`` (over the network), ``stream/storage_mb_per_s`` (read from shards, cached ones
            included), ``stream/frames_per_s``, ``stream/clips_per_s``; ``stream/quarantined``, a number of samples;
            ``stream/fallbacks``, those that the fast decoder could not take; ``stream/queue_mb``, the most that all
            queues held at one time (MB are 10**6 bytes); and for each stage ``stream/<stage>_percent``, the share of
            the time in which it was busy.
        """
        with self._lock:
            now = self._clock()
            # Two laps at the same tick of the clock did nothing in no time.
            elapsed = max(now - self._lap_began, 1e-9)
            for stage, since in self._since.items():
                # What still goes on counts in both laps, in each with its part.
                self._seconds[stage] += now - since
                self._since[stage] = now
            figures = {
                "stream/fetched_mb_per_s": self._counts["fetched_bytes"] / _MB / elapsed,
                "stream/storage_mb_per_s": self._counts["storage_bytes"] / _MB / elapsed,
                "stream/frames_per_s": self._counts["frames"] / elapsed,
                "stream/clips_per_s": self._counts["clips"] / elapsed,
                "stream/quarantined": float(self._counts["quarantined"]),
                "stream/fallbacks": float(self._counts["fallbacks"]),
                "stream/queue_mb": self._most_waiting / _MB,
                **{f"stream/{stage}_percent": 100 * s / elapsed for stage, s in self._seconds.items()},
            }
            self._lap_began = now
            self._seconds = dict.fromkeys(self._seconds, 0.0)
            self._counts = dict.fromkeys(self._counts, 0)
            self._most_waiting = sum(self._waiting.values())
        return figures


def bottleneck(figures: Mapping[str, float]) -> str:
    """One line: what holds the training up, by which figures, and what to do about it.

    Args:
        figures: `Gauges.lap`'s, with the trainer's ``data_wait_percent`` and ``prompter_wait_percent``. What is
            missing or not a number is not known; without the wait for data nothing can be said.
    """
    data, prompter = _known(figures, "data_wait_percent"), _known(figures, "prompter_wait_percent") or 0.0
    if data is None:
        return "bottleneck: not known (data_wait_percent is missing)"
    if max(data, prompter) < _NOTABLE_WAIT:
        return f"bottleneck: the model (data wait {_percent(data)}, prompter {_percent(prompter)})"
    if prompter > data:
        return (
            f"bottleneck: the prompter (the step waits {_percent(prompter)} of its time for soft labels, "
            f"{_percent(data)} for data): with prompter.placement=process raise prompter.lookahead, or "
            "prompter.num_threads on a CPU"
        )
    return f"bottleneck: {_slow_stage(data, figures)}"


def _slow_stage(data_wait: float, figures: Mapping[str, float]) -> str:
    """The stage for which the step waits, with reasons and remedy."""
    known = {stage: _known(figures, f"stream/{stage}_percent") for stage in _NAMES}
    busy = {stage: percent for stage, percent in known.items() if percent is not None}
    order = sorted(busy, key=lambda stage: -busy[stage])
    # Fetching is a part of reading. The others may take turns on one thread, which is then never idle though none of
    # them is busy for long.
    own = [stage for stage in order if stage != "fetch"]
    slowest: Stage | None = own[0] if own and sum(busy[stage] for stage in own) >= _BUSY else None
    if slowest == "read" and busy.get("fetch", 0.0) >= busy["read"] / 2:
        slowest = "fetch"
    waits = f"the step waits {_percent(data_wait)} of its time for data"
    if slowest is None:
        work = ", ".join(f"{_NAMES[stage]} is busy {_percent(busy[stage])}" for stage in order)
        return (
            f"the loader, but none of its stages ({waits}; {work or 'its stages are not known'}): batches come "
            "unevenly or CPU cores are short; raise stream.decode.prefetch, or give each rank more cores"
        )
    work = f"{_NAMES[slowest]} is busy {_percent(busy[slowest])}" + "".join(
        f", {_NAMES[stage]} {_percent(busy[stage])}" for stage in order if stage != slowest
    )
    return f"{_NAMES[slowest]} ({waits}; {work}): {_REMEDIES[slowest]}"


def _known(figures: Mapping[str, float], name: str) -> float | None:
    value = figures.get(name)
    return value if value is not None and isfinite(value) else None


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value < 9.95 else f"{value:.0f} %"
