"""What settings do to the rate and the memory of a training, one changed at a time: `python benchmarks/settings.py`.

The demo's pre-training, from what `make demo` left, each time as a command of its own, whose memory is that of all its
processes. They take turns, and are compared round by round, as both of a round met the same moment of the machine:
`times` is the median of these quotients. The limit of each is the run with the demo's own settings; of those of two
ranks, the run with two ranks.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from alpro_stream.config import load_config
from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.run import RunConfig
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics
from benchmarks.demo import PeakMemory
from benchmarks.harness import Measurement, Row, main, measure, quotients

CONFIG = "configs/demo/pretrain.yaml"
WARMUP_STEPS = 5
DEMO, TWO_RANKS = "as the demo", "two ranks"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of training.

    Attributes:
        overrides: of the demo's configuration.
        num_ranks: processes that train.
        variables: of the environment.
        beside: the variant that it is compared with.
    """

    overrides: Sequence[str] = ()
    num_ranks: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    beside: str = DEMO


_OVERRIDES = (
    "stream.decode.num_workers=0",
    "prompter.placement=inline",
    "prompter.lookahead=4",
    "stream.global_batch=6",
    "train.engine.num_micro_batches=2",
    "train.engine.activation_checkpointing=true",
    "train.engine.zero_stage=0",
    "train.engine.num_threads=1",
)
VARIANTS: Mapping[str, Variant] = {
    DEMO: Variant(),
    **{override: Variant([override]) for override in _OVERRIDES},
    TWO_RANKS: Variant(num_ranks=2),
    "two ranks, OMP_WAIT_POLICY=ACTIVE": Variant(
        num_ranks=2, variables={"OMP_WAIT_POLICY": "ACTIVE"}, beside=TWO_RANKS
    ),
}


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Trains with each setting in turn."""
    start_from = load_config(RunConfig, CONFIG).start_from
    if start_from is not None and not complete_checkpoints(start_from):
        raise ConfigError("the benchmark trains on what the demo made; run `make demo` first")
    num_steps, repetitions = (3, 1) if arguments.quick else (25, 5)
    memory: dict[str, list[float]] = {name: [] for name in VARIANTS}
    found = measure(
        {name: partial(_clips_per_s, variant, num_steps, memory[name]) for name, variant in VARIANTS.items()},
        repetitions,
        warmup=0,  # Each begins in a process of its own, whose first steps do not count.
    )
    return [_row(name, found, statistics.median(memory[name])) for name in found]


def _row(name: str, found: Mapping[str, Measurement], memory_gib: float) -> Row:
    beside = VARIANTS[name].beside
    times = quotients(found[name], found[beside])
    details = {"GiB": memory_gib, "times": times.median, "spread of times": times.spread or 0.0}
    return Row.of(name, found[name], "clips/s", found[beside], details=details, limit_of=beside)


def _clips_per_s(variant: Variant, num_steps: int, memory: list[float]) -> float:
    """Of the steps behind the warm-up; adds the most memory of all processes."""
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        overrides = [
            f"run_dir={folder}",
            f"train.max_steps={WARMUP_STEPS + num_steps}",
            "train.checkpoint_every=1000000",
            "train.rehearsal=false",
            *variant.overrides,
        ]
        command = [sys.executable, "-m", "alpro_launch.cli", "train", "--ranks", str(variant.num_ranks), CONFIG]
        environment = {**os.environ, **variant.variables}
        log = Path(folder) / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen([*command, *overrides], env=environment, stdout=output, stderr=subprocess.STDOUT)
            peak = PeakMemory(process.pid)
            if status := process.wait():
                raise AlproError(f"{' '.join(overrides)} ended with status {status}: {log.read_text()[-2000:]}")
        memory.append(peak.peak_gib)
        lines = read_metrics(Path(folder))[WARMUP_STEPS:]
        batch = load_config(RunConfig, CONFIG, overrides).stream.global_batch
        return batch * len(lines) / sum(float(line["step_s"]) for line in lines)


if __name__ == "__main__":
    main("settings", rows, describe_content=lambda arguments: {"config": CONFIG})
