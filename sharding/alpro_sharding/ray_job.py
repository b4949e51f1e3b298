"""Runs tasks on Ray: a local one started for the job, or the cluster that ``RAY_ADDRESS`` names."""

import heapq
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import alpro_sharding
import alpro_stream
from alpro_sharding.results import RUNNING_SUFFIX, ShardResult
from alpro_sharding.worker import ShardTask, make_shard
from alpro_stream.errors import ShardError, WriteError

# Tasks handed to Ray for each one that runs: the next is there when one ends, and memory stays bounded.
_TASKS_PER_SLOT = 2
_MAX_ATTEMPTS = 10
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_POLL_S = 2.0
_RUNNING_NOTE_S = 5.0
_WORKER_MEMORY_BYTES = 800 << 20
_OBJECT_STORE_BYTES = 100 << 20  # tasks and results are small; media never pass through Ray

OnResult = Callable[[ShardTask, ShardResult], None]
OnPoll = Callable[[Sequence[ShardTask]], None]

logger = logging.getLogger(__name__)


def run_tasks(tasks: Iterable[ShardTask], num_workers: int | None, on_result: OnResult, on_poll: OnPoll) -> None:
    """Makes all shards. Without a task, Ray is not started.

    A task whose worker or node died is handed out again, after a wait with jitter that doubles.

    Args:
        tasks: read only as far ahead as workers need.
        num_workers: shards made at the same time; None for one a core.
        on_result: called in this process as each shard is finished.
        on_poll: called every few seconds with the tasks under way.

    Raises:
        ShardError: the target cannot be written, the cluster is gone, or workers died over the same shard again and
            again (the other shards are made first).
    """
    tasks = iter(tasks)
    first = next(tasks, None)
    if first is None:
        return
    with _ray(num_workers) as (ray, is_local):
        run = _Run(ray, chain([first], tasks), num_workers, is_local)
        try:
            crashed = run.until_done(on_result, on_poll)
        except (ray.exceptions.RayError, ConnectionError) as error:
            reason = f"the Ray cluster is gone ({error}); the same command goes on with what is missing"
            raise ShardError(reason) from error
    if crashed:
        raise ShardError(
            f"the workers of {len(crashed)} shard(s) died {_MAX_ATTEMPTS} times: {', '.join(crashed[:5])}. Out of "
            "memory, perhaps; all other shards are made, the same command tries these again"
        )


def wait_before(attempt: int, draw: float) -> float:
    """Seconds to wait before an attempt, counted from 1 for the first one after a failure.

    Args:
        attempt: how often it has failed.
        draw: uniform in [0, 1): tasks of one dead node must not all come back in the same moment.
    """
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempt - 1))
    return float(longest * (0.5 + 0.5 * draw))


@dataclass(order=True, slots=True)
class _Waiting:
    """A task that failed, and when it is its turn again."""

    due: float
    task: ShardTask = field(compare=False)


class _Run:
    """The tasks under way, those to come and those to try again."""

    def __init__(self, ray: Any, tasks: Iterator[ShardTask], num_workers: int | None, is_local: bool) -> None:
        self._ray = ray
        self._tasks = tasks
        self._num_workers = num_workers
        self._is_local = is_local
        self._exhausted = False
        # The retries are ours, not Ray's: they wait, and they are counted by shard.
        options = {"num_cpus": 1, "memory": _WORKER_MEMORY_BYTES, "max_retries": 0}
        self._remote = ray.remote(**options)(_make_shard_on_ray).options(name="make_shard")
        self._running: dict[Any, ShardTask] = {}
        self._waiting: list[_Waiting] = []
        self._attempts: dict[str, int] = {}
        self._limit, self._limit_until = 0, 0.0

    def until_done(self, on_result: OnResult, on_poll: OnPoll) -> list[str]:
        """Runs everything; gives the names of the shards whose workers died every time."""
        crashed: list[str] = []
        polled = time.monotonic()
        while True:
            self._submit()
            if not self._running and not self._waiting:
                return crashed
            if time.monotonic() - polled >= _POLL_S:
                on_poll(list(self._running.values()))
                polled = time.monotonic()
            if not self._running:
                time.sleep(min(_POLL_S, max(0.0, self._waiting[0].due - time.monotonic())))
                continue
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            for reference in done:
                task = self._running.pop(reference)
                try:
                    on_result(task, self._ray.get(reference))
                except self._ray.exceptions.RayTaskError as error:
                    raise _cause(error) from error
                except self._ray.exceptions.RayError as error:
                    if not self._try_again(task, error):
                        crashed.append(_name(task))

    def _submit(self) -> None:
        while len(self._running) < self._most_at_once():
            task: ShardTask | None
            if self._waiting and self._waiting[0].due <= time.monotonic():
                task = heapq.heappop(self._waiting).task
            else:
                task = None if self._exhausted else next(self._tasks, None)
                self._exhausted = self._exhausted or task is None
            if task is None:
                return
            self._running[self._remote.remote(task)] = task

    def _most_at_once(self) -> int:
        """Tasks handed out at a time; a cluster that grows gets more."""
        if time.monotonic() > self._limit_until:
            slots = self._num_workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            # Of a cluster, only as many as were asked for run; a local Ray has no more slots than that.
            ahead = 1 if self._num_workers and not self._is_local else _TASKS_PER_SLOT
            self._limit, self._limit_until = ahead * slots, time.monotonic() + 5 * _POLL_S
        return self._limit

    def _try_again(self, task: ShardTask, error: Exception) -> bool:
        name = _name(task)
        attempts = self._attempts[name] = self._attempts.get(name, 0) + 1
        if attempts >= _MAX_ATTEMPTS:
            return False
        wait_s = wait_before(attempts, random.random())
        logger.warning("the worker of %s died (%s); another one takes it in %.0f s", name, type(error).__name__, wait_s)
        heapq.heappush(self._waiting, _Waiting(time.monotonic() + wait_s, task))
        return True


def _name(task: ShardTask) -> str:
    return f"{task.planned.split}/{task.planned.name}"


def _make_shard_on_ray(task: ShardTask) -> ShardResult:
    """The body of a task: makes the shard, tells the driver and Ray's dashboard how far it is."""
    from ray.util.metrics import Counter

    counters = {
        name: Counter(f"alpro_shard_{name}", description=description, tag_keys=("split", "kind"))
        for name, description in _METRICS.items()
    }
    tags = {"split": task.planned.split, "kind": task.planned.kind}
    running = task.note.with_suffix(RUNNING_SUFFIX)
    noted_at, counted = time.monotonic(), 0

    def on_row(num_rows: int) -> None:
        nonlocal noted_at, counted
        if time.monotonic() - noted_at >= _RUNNING_NOTE_S:
            noted_at = time.monotonic()
            with suppress(OSError):  # only tells how far it is; whether the disk takes the shard, the shard finds out
                running.write_text(str(num_rows))
            counters["rows"].inc(num_rows - counted, tags)
            counted = num_rows

    try:
        result = make_shard(task, on_row)
    finally:
        with suppress(OSError):
            running.unlink(missing_ok=True)
    values = {
        "rows": result.num_rows - counted,
        "samples": result.shard.num_samples if result.shard else 0,
        "failures": len(result.failures),
        "bytes": result.shard.num_bytes if result.shard else 0,
        "decode_seconds": result.work.decode_s,
        "fetch_seconds": result.work.fetch_s,
    }
    for name, value in values.items():
        if value > 0:
            counters[name].inc(value, tags)
    return result


_METRICS = {
    "rows": "manifest rows done",
    "samples": "samples written",
    "failures": "rows that gave no sample",
    "bytes": "bytes of published tars",
    "decode_seconds": "seconds of decoding, scaling and encoding",
    "fetch_seconds": "seconds of fetching and hashing",
}


def _cause(error: Any) -> Exception:
    cause = error.cause
    if isinstance(cause, ShardError):
        return type(cause)(str(cause))
    if isinstance(cause, OSError):
        return WriteError(f"cannot write the shards: {cause}")
    return ShardError(f"a worker failed: {error}")


@contextmanager
def _ray(num_workers: int | None) -> Iterator[tuple[Any, bool]]:
    """Ray, for as long as the block lasts, and whether it is local; a local one is stopped afterwards.

    A caller that has connected to Ray already keeps its connection.
    """
    # Read when Ray is imported: nothing is reported to its makers, and no notes about accelerators.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray, False
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    is_local = not os.environ.get("RAY_ADDRESS")
    try:
        if is_local:
            ray.init(
                address="local",
                num_cpus=num_workers or len(os.sched_getaffinity(0)),
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            ray.init(runtime_env={"py_modules": package_folders()}, **quiet)
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise ShardError(f"Ray did not start: {error}; RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}") from error
    try:
        yield ray, is_local
    finally:
        ray.shutdown()


def package_folders() -> list[str]:
    """The folders of our packages, which nodes of a cluster need and do not have installed."""
    return [next(iter(package.__path__)) for package in (alpro_stream, alpro_sharding)]
