"""What is to be done next, and how long it may take: pure decisions."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from alpro_launch.ablate.jobs import Job
from alpro_launch.ablate.records import Record

State = Literal["todo", "done", "diverged", "failed"]


def states(jobs: Sequence[Job], records: Mapping[Job, Record | None]) -> dict[Job, State]:
    """How far each job is before anything is started.

    Args:
        jobs: each behind the one that it needs.
        records: what is known of them.
    """
    found: dict[Job, State] = {}
    for job in jobs:
        record, needed = records[job], records[job.after] if job.after else None
        is_ready = not job.after or found[job.after] == "done"
        is_known = record and record.digest == job.digest and record.made_from == (needed.made if needed else 0.0)
        if record and is_known and is_ready and record.state in ("done", "diverged"):
            found[job] = "done" if record.state == "done" else "diverged"
        else:
            found[job] = "todo"
    return found


def next_job(jobs: Sequence[Job], found: Mapping[Job, State], running: Collection[Job]) -> Job | None:
    """The first that can be started now; None where there is none."""
    for job in jobs:
        if found[job] == "todo" and job not in running and (not job.after or found[job.after] == "done"):
            return job
    return None


def left(jobs: Sequence[Job], found: Mapping[Job, State]) -> list[Job]:
    """Those that are not done and can still be: none before them failed or diverged."""
    blocked: set[Job] = set()
    possible = []
    for job in jobs:
        if found[job] in ("failed", "diverged") or job.after in blocked:
            blocked.add(job)
        elif found[job] == "todo":
            possible.append(job)
    return possible


def remaining_s(jobs: Sequence[Job], seconds: Mapping[str, Sequence[float]], num_at_once: int) -> tuple[float, bool]:
    """About how long jobs will take.

    Args:
        jobs: that are left.
        seconds: by stage, those that jobs of it took.
        num_at_once: that run together.

    Returns:
        Seconds, and whether a stage has not been seen yet, so that it is longer than that.
    """
    known = [sum(took) / len(took) for job in jobs if (took := seconds.get(job.stage, ()))]
    return sum(known) / max(1, min(num_at_once, len(jobs))), len(known) < len(jobs)


def fate(job: Job, found: Mapping[Job, State]) -> str:
    """What became of a job, in words; empty where it is done."""
    chain = [job]
    while chain[-1].after:
        chain.append(chain[-1].after)
    for one in reversed(chain):
        if found[one] in ("failed", "diverged"):
            return f"{found[one]} in {one.stage}"
    return "" if found[job] == "done" else "not run"
