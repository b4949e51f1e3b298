"""`alpro demo`: the whole way on the example clips, each stage by the command that does it on one's own data."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alpro_launch.processes import run
from alpro_launch.tables import retrieval_table
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError

if TYPE_CHECKING:
    from alpro_launch.run_page import Stages

_CONFIGS = {name: f"configs/demo/{name}.yaml" for name in ("shard", "prompter", "pretrain", "evaluate")}
_NOTE = (
    "Retrieval is measured on the very clips the model was trained on. It shows that every stage works and that the "
    "model can memorise a small set; it says nothing about clips it has not seen. The prompter too has seen nothing "
    "but these clips: the entities it names are often wrong."
)
OWN_COMMANDS = (
    (
        "alpro shard configs/demo/shard.yaml manifest=my/manifest.jsonl work_dir=runs/mine",
        'my/manifest.jsonl has a line for each clip: {"id": "a1", "media": "a1.mp4", "captions": ["..."]}',
    ),
    (
        "alpro train configs/demo/prompter.yaml configs/demo/pretrain.yaml work_dir=runs/mine",
        "with fewer than 12 clips or images: it names the settings that fit",
    ),
    ("alpro evaluate configs/demo/evaluate.yaml work_dir=runs/mine", "retrieval figures in runs/mine/evaluation"),
)


def run_demo(work_dir: str) -> int:
    """Runs what has not been done yet; returns the exit status of the first stage that failed.

    Raises:
        ConfigError: not in a checkout.
    """
    missing = [path for path in ("examples/clips/manifest.jsonl", *_CONFIGS.values()) if not Path(path).is_file()]
    if missing:
        raise ConfigError(f"the demo needs a checkout of the project as current folder; {missing[0]} is not here")
    stages = {
        "Sharding": ("shard", "shard"),
        "Training the prompter": ("train", "prompter"),
        "Pre-training": ("train", "pretrain"),
        "Evaluation": ("evaluate", "evaluate"),
    }
    clock = _StageClock(Path(work_dir) / "seconds.json")
    for number, (name, (command, config)) in enumerate(stages.items(), start=1):
        print(f"\n{number}/{len(stages) + 1} {name}", flush=True)
        with clock.stage(name):
            status = run([sys.executable, "-m", "alpro_launch.cli", command, _CONFIGS[config], f"work_dir={work_dir}"])
        if status:
            print(f"{name} ended with status {status}; the same command goes on from here", file=sys.stderr)
            return status if status > 0 else 1
    print(f"\n{len(stages) + 1}/{len(stages) + 1} Report", flush=True)
    _report(work_dir, clock.seconds)
    return 0


def load_stages(work_dir: str, train_overrides: Sequence[str] = ()) -> "Stages":
    """The demo's configurations in a work folder."""
    from alpro_launch.run_page import Stages
    from alpro_sharding import ShardConfig
    from alpro_stream.evaluate.retrieval import RetrievalConfig
    from alpro_stream.run import RunConfig

    here = [f"work_dir={work_dir}"]
    return Stages(
        shard=load_config(ShardConfig, _CONFIGS["shard"], here),
        prompter=load_config(RunConfig, _CONFIGS["prompter"], [*here, *train_overrides]),
        pretrain=load_config(RunConfig, _CONFIGS["pretrain"], [*here, *train_overrides]),
        evaluate=load_config(RetrievalConfig, _CONFIGS["evaluate"], here),
    )


def _report(work_dir: str, seconds: dict[str, float]) -> None:
    from alpro_launch.run_page import write_run_page
    from alpro_stream.train.checkpoint import latest_checkpoint

    stages = load_stages(work_dir)
    page = Path(work_dir) / "report.html"
    write_run_page(
        page,
        stages,
        title="alpro-stream demo run",
        summary="Real clips and images, sharded with Ray, streamed through DALI, trained with DeepSpeed beside a "
        "frozen prompter, and searched by their captions.",
        note=_NOTE,
        seconds=seconds,
        commands=OWN_COMMANDS,
    )
    result = json.loads((stages.evaluate.out / "result.json").read_text(encoding="utf-8"))
    print(retrieval_table(result))
    print("(on the clips it was trained on: memorisation of a small set, not quality)\n")
    print(f"page        {page}")
    print(f"checkpoint  {latest_checkpoint(stages.pretrain.run_dir)}")
    print(f"shards      {stages.shard.out}\n")
    print("The same on your own videos (in the environment: source .venv/bin/activate):")
    for command, explanation in OWN_COMMANDS:
        print(f"  {command}\n      {explanation}")


class _StageClock:
    """Seconds spent in each stage over all attempts, kept in a file so that an interrupted demo adds up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = {}
        if path.is_file():
            self.seconds = json.loads(path.read_text(encoding="utf-8"))

    def stage(self, name: str) -> "_Lap":
        return _Lap(self, name)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.seconds), encoding="utf-8")


class _Lap:
    def __init__(self, clock: _StageClock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock.add(self._name, time.perf_counter() - self._started)
