"""Runs tasks on Ray: a local one started for the job, or the cluster that ``RAY_ADDRESS`` names."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import alpro_sharding
import alpro_stream
from alpro_sharding.worker import ShardResult, ShardTask, make_shard
from alpro_stream.errors import ShardError

# Tasks handed to Ray for each one that runs: the next is there when one ends, and memory stays bounded.
_TASKS_PER_SLOT = 2
_MAX_RETRIES = 3
_OBJECT_STORE_BYTES = 100 << 20  # tasks and results are small; media never pass through Ray

logger = logging.getLogger(__name__)


def run_tasks(
    tasks: Iterable[ShardTask], num_workers: int | None, on_result: Callable[[ShardTask, ShardResult], None]
) -> None:
    """Makes all shards; `on_result` is called as each is finished. Without a task, Ray is not started.

    Args:
        tasks: read only as far ahead as workers need.
        num_workers: shards made at the same time; None for one a core.
        on_result: called in this process.

    Raises:
        ShardError: the target cannot be written, or workers died over the same shard again and again (the other
            shards are made first).
    """
    tasks = iter(tasks)
    first = next(tasks, None)
    if first is None:
        return
    with _ray(num_workers) as ray:
        slots = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        crashed = _run(ray, chain([first], tasks), _TASKS_PER_SLOT * slots, on_result)
    if crashed:
        raise ShardError(
            f"the workers of {len(crashed)} shard(s) died {_MAX_RETRIES + 1} times: {', '.join(crashed[:5])}. Out of "
            "memory, or a file that crashes the decoder; all other shards are made, the same command tries these again"
        )


def _run(
    ray: Any, tasks: Iterator[ShardTask], limit: int, on_result: Callable[[ShardTask, ShardResult], None]
) -> list[str]:
    remote = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(make_shard)
    running: dict[Any, ShardTask] = {}
    crashed: list[str] = []
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < limit:
            task = next(tasks, None)
            exhausted = task is None
            if task is not None:
                running[remote.remote(task)] = task
        if not running:
            break
        done, _ = ray.wait(list(running), num_returns=1)
        task = running.pop(done[0])
        try:
            on_result(task, ray.get(done[0]))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except ray.exceptions.RayError as error:
            name = f"{task.planned.split}/{task.planned.name}"
            logger.warning("the worker of %s died: %s", name, type(error).__name__)
            crashed.append(name)
    return crashed


def _cause(error: Any) -> Exception:
    cause = error.cause
    if isinstance(cause, ShardError):
        return ShardError(str(cause))
    if isinstance(cause, OSError):
        return ShardError(f"cannot write the shards: {cause}")
    return ShardError(f"a worker failed: {error}")


@contextmanager
def _ray(num_workers: int | None) -> Iterator[Any]:
    """Ray, for as long as the block lasts; a local one is stopped afterwards, its processes included.

    A caller that has connected to Ray already keeps its connection.
    """
    # Read when Ray is imported: nothing is reported to its makers, and no notes about accelerators.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(runtime_env={"py_modules": package_folders()}, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=num_workers or len(os.sched_getaffinity(0)),
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise ShardError(f"Ray did not start: {error}; RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def package_folders() -> list[str]:
    """The folders of our packages, which nodes of a cluster need and do not have installed."""
    return [next(iter(package.__path__)) for package in (alpro_stream, alpro_sharding)]
