"""A whole pre-training run of the published model with loader and prompter at work: what it waits for.

It trains on the shards that `benchmarks/stream.py` makes of the example clips, where these are there or can be made,
else on made-up frames. The prompter has one step of training: its labels are of no use, and cost the same.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from alpro_stream.config import validate
from alpro_stream.errors import AlproError
from alpro_stream.model.alpro import ModelConfig
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.shards import write_dataset, write_tokenizer
from alpro_stream.train.metrics import read_metrics
from benchmarks.corpus import EXAMPLES, make_shards, open_corpus
from benchmarks.gpu_pieces.piece import Parts, Setting, peak_gib
from benchmarks.harness import Measurement, Row, Target

# The first steps wait for everything to start, and find caches empty.
_NUM_WARMUP_STEPS = 4
_WAITS = ("data", "prompter")


def parts(setting: Setting) -> Parts:
    folder = tempfile.TemporaryDirectory(prefix="alpro-gpu-")
    bench = cache(partial(Bench, setting, folder))
    devices = ("mixed", "cpu") if setting.is_cuda else ("cpu",)
    return {f"training, frames decoded on {device}": partial(_measured, bench, device) for device in devices}


def _measured(bench: Callable[[], "Bench"], decode_on: str) -> Sequence[Row]:
    return bench().measure(decode_on)


class Bench:
    """Shards and a prompter, made once.

    Args:
        setting: the device and the sizes.
        folder: for all that is made; removed with this.
    """

    def __init__(self, setting: Setting, folder: "tempfile.TemporaryDirectory[str]") -> None:
        self._setting = setting
        self._folder = folder
        self.shards, self.content = self._open_shards()
        prompter = self._config("prompter", {"task": "prompter"}, num_steps=1)
        self._checkpoint = train(prompter).checkpoint

    def measure(self, decode_on: str) -> Sequence[Row]:
        """Trains for some steps; rows of those behind the warm-up."""
        is_quick = self._setting.is_quick
        precision = "bf16" if self._setting.is_cuda else "fp32"
        prompter = {"checkpoint": str(self._checkpoint), "precision": precision, "deadline_s": 100}
        if is_quick:
            prompter["placement"] = "inline"  # `prompter.py` starts the process, which takes long
        values = {
            "task": "pretrain",
            "prompter": prompter,
            "decode": {"device": decode_on, "num_workers": 0 if is_quick else 4},
        }
        config = self._config(f"pretrain-{decode_on}", values, num_steps=_NUM_WARMUP_STEPS + (2 if is_quick else 26))
        train(config)
        lines = read_metrics(config.run_dir)[_NUM_WARMUP_STEPS:]
        # A step hands its work to the GPU and goes on: only the sum of many is sure.
        rate = config.stream.global_batch * len(lines) / sum(line["step_s"] for line in lines)
        details: dict[str, float] = {name: _mean(lines, name) for name in ("tflops", "mfu_percent") if name in lines[0]}
        name = f"training, batch {config.stream.global_batch}, {self.content}, decoded on {decode_on}"
        target = None if is_quick else Target(at_most=0.01)
        waits = {what: Measurement(tuple(line[f"{what}_wait_percent"] / 100 for line in lines)) for what in _WAITS}
        return [
            Row(name=name, value=rate, unit="clips/s", details={**details, **peak_gib(self._setting.device)}),
            *(Row.of(f"{name}: {what} wait", share, "of the step", target=target) for what, share in waits.items()),
        ]

    def _config(self, name: str, changes: Mapping[str, Any], num_steps: int) -> RunConfig:
        is_quick = self._setting.is_quick
        values = dict(changes)
        stream = {
            "sources": [{"path": str(self.shards / "train"), "kind": "video"}],
            "global_batch": 8 if is_quick else 64,
            "num_lanes": 4,
            "text": {"tokenizer": str(self.shards / "tokenizer"), "num_tokens": 12 if is_quick else 30},
            "decode": values.pop("decode", {"num_workers": 0}),
        }
        engine = {"zero_stage": 0, "precision": "bf16" if self._setting.is_cuda else "fp32"}
        run = {
            "run_dir": str(Path(self._folder.name) / name),
            "stream": stream,
            "model": TINY_MODEL if is_quick else ModelConfig().model_dump(),
            "train": {"max_steps": num_steps, "checkpoint_every": 10**6, "rehearsal": False, "engine": engine},
            **values,
        }
        return validate(RunConfig, run, source=__name__)

    def _open_shards(self) -> tuple[Path, str]:
        """Where shards are, and what they hold."""
        if not self._setting.is_quick:
            try:
                return make_shards(open_corpus(EXAMPLES)), "example clips"
            except (AlproError, ModuleNotFoundError) as error:
                print(f"no shards of the example clips: {error}")
        shards, size = Path(self._folder.name) / "shards", 64 if self._setting.is_quick else 256
        write_dataset(shards / "train", video_shards=(5, 9, 1, 9) if self._setting.is_quick else (26,) * 8, size=size)
        write_tokenizer(shards / "tokenizer")
        return shards, "made-up frames"


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(line[name] for line in lines) / len(lines))
