"""`alpro inspect RUN` and `CHECKPOINT`: what was committed, and where exactly the run would go on."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alpro_launch.launch_log import read_launch_log
from alpro_stream.config import differences, load_config
from alpro_stream.errors import AlproError
from alpro_stream.run import RunConfig
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.cursor import Cursor, steps_left
from alpro_stream.stream.gauges import bottleneck
from alpro_stream.stream.plan import PLAN_VERSION, Plan
from alpro_stream.stream.sources import Source, closing_storage, open_sources
from alpro_stream.train.checkpoint import complete_checkpoints, read_state
from alpro_stream.train.metrics import METRICS_FILE, read_metrics
from alpro_stream.train.trainer import mean_figures

_NUM_KEYS = 8
_RECENT_STEPS = 100


def checkpoint_view(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, and ``goes_on``: the next step, from where in the data, with which samples.

    What needs the data set is null where that is not there any more, and ``data`` says so.

    Args:
        checkpoint: a complete one.

    Raises:
        CheckpointError: its state cannot be read.
        ConfigError: its configuration cannot be read.
    """
    state = read_state(checkpoint)
    config = load_config(RunConfig, checkpoint / "config.yaml")
    cursor = Cursor.from_dict(state["cursor"])
    left = steps_left(cursor.step, state["num_steps"], config.stream.skip_steps)
    step = next(left, None)
    goes_on: dict[str, Any] = {
        "step": step,
        "epoch": None,
        "source": None,
        "pass": None,
        "step_in_pass": None,
        "next_keys": None,
        "skipped": [list(steps) for steps in cursor.skipped],
    }
    if step is None:
        data = "not looked at: the run has reached its last step"
    else:
        found, data = _look_at_data(config, state["fingerprint"], step)
        goes_on |= found
    return {
        "checkpoint": str(checkpoint),
        "goes_on": {**goes_on, "data": data, "summary": _sum_up(goes_on, data)},
        **state,
    }


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, which may not have come to its first step or checkpoint yet."""
    # The lock is the first thing that a run leaves.
    return bool(complete_checkpoints(path)) or any((path / name).is_file() for name in (METRICS_FILE, ".lock"))


def run_view(run_dir: Path) -> dict[str, Any]:
    """The complete checkpoints of a run, oldest first, its last step, and what holds it up if its metrics tell.

    ``attempts`` are those of `alpro train --max-restarts` and `--hostfile`, and of jobs of Slurm, oldest first.
    """
    lines, attempts = read_metrics(run_dir), read_launch_log(run_dir)
    return {
        "checkpoints": [checkpoint.name for checkpoint in complete_checkpoints(run_dir)],
        "last_step": int(lines[-1]["step"]) if lines else None,
        **({"bottleneck": found} if (found := recent_bottleneck(lines)) else {}),
        **({"attempts": attempts} if attempts else {}),
    }


def recent_bottleneck(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What holds a run up, by its latest metrics; None where they do not tell."""
    recent = [line for line in lines[-_RECENT_STEPS:] if "data_wait_percent" in line]
    numbers = [{name: x for name, x in line.items() if isinstance(x, int | float)} for line in recent]
    return bottleneck(mean_figures(numbers)) if numbers else None


def _look_at_data(config: RunConfig, fingerprint: dict[str, Any], step: int) -> tuple[dict[str, Any], str]:
    """What the data tell of the next step, and in what state they are."""
    stream = config.stream
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        try:
            storage = stack.enter_context(closing_storage(stream.sources, stream.cache, stream.fetch))
            sources = open_sources(stream.sources, stream.unit, storage)
            for opened in sources:
                stack.callback(opened.reader.close)
            plan = make_plan(stream, sources)
            source, pass_index, step_in_pass = plan.place(step)
            found = {
                "epoch": step // plan.steps_per_epoch,
                "source": sources[source].name,
                "pass": pass_index,
                "step_in_pass": step_in_pass,
            }
            changed = _changes(fingerprint, sources)
            if changed:
                # Keys of other data would look like an answer, and be none.
                return found, f"changed: {'; '.join(changed)}"
            return found | {"next_keys": _first_keys(plan, sources, step)}, "unchanged"
        except (AlproError, OSError) as error:
            return found, f"not found: {error}"


def _changes(fingerprint: dict[str, Any], sources: Sequence[Source]) -> list[str]:
    """How data and program differ from those of the run (saved != now), as far as the order depends on them."""
    changes = []
    if fingerprint["plan_version"] != PLAN_VERSION:
        changes.append(f"order of another version of the program: {fingerprint['plan_version']} != {PLAN_VERSION}")
    saved = {entry["name"]: entry for entry in fingerprint["sources"].values()}
    for source in sources:
        entry = saved.get(source.name, {})
        now = {"dataset": source.reader.info.digest, "exclude": source.listing.exclude_digest}
        changes += [f"source {source.name}: {line}" for line in differences({k: entry.get(k) for k in now}, now)]
    return changes


def _first_keys(plan: Plan, sources: Sequence[Source], step: int) -> list[str]:
    planned = plan.part(step, range(min(plan.num_lanes, _NUM_KEYS)))
    source = sources[planned.source]
    keys = []
    for shard, unit in planned.refs.reshape(-1, 2)[:_NUM_KEYS].tolist():
        slot, _ = source.locate(shard, unit)
        keys.append(source.reader.index(source.shards[shard].name).key(slot))
    return keys


def _sum_up(goes_on: dict[str, Any], data: str) -> str:
    """The answer to: will the run continue from exactly where it stopped?"""
    if goes_on["step"] is None:
        return "the run is finished: nothing is left to do"
    where = f"step {goes_on['step']}"
    if goes_on["source"] is not None:
        where += f", which is step {goes_on['step_in_pass']} of pass {goes_on['pass']} of source {goes_on['source']}"
    if data == "unchanged":
        return f"the run goes on from exactly where it stopped, with {where}"
    if data.startswith("changed"):
        return f"the run stopped before {where}, and does not go on from there with the data as they are now"
    return f"the run stopped before {where}, and cannot go on until its data are there"
