"""A whole pre-training run of the published model with loader and prompter at work: what it waits for.

It trains on stored frames of the example clips, where these are there, else on made-up ones. The prompter is not
trained: its labels are of no use, and cost the same. Nothing is saved at the end, so the disk of `TMPDIR` needs 0.7 GB:
the weights of the prompter, and some small shards.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from alpro_stream.config import validate
from alpro_stream.model.alpro import ModelConfig
from alpro_stream.model.folder import ModelDescription, write_model
from alpro_stream.run import RunConfig, train
from alpro_stream.shards.entities import save_entities
from alpro_stream.shards.layout import ENTITIES_FILE, DatasetInfo, save_dataset_info
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.shards import NOUNS, sample, write_dataset, write_tokenizer
from alpro_stream.train.metrics import read_metrics
from benchmarks.gpu_pieces.decode import example_frames
from benchmarks.gpu_pieces.piece import LeftOutError, Parts, Setting, peak_gib
from benchmarks.harness import Measurement, Row, Target

# The first steps wait for everything to start, and find caches empty.
_NUM_WARMUP_STEPS = 4
_WAITS = ("data", "prompter")
_SHARDS, _FRAMES_OF_A_CLIP, _STORED_SIZE = (26,) * 8, 8, 256


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
        self._made = folder
        self._folder = Path(folder.name)
        self._model = TINY_MODEL if setting.is_quick else ModelConfig().model_dump()
        self._num_tokens = 12 if setting.is_quick else 30
        self._tokenizer = write_tokenizer(self._folder / "tokenizer")
        self.content = write_shards(self._folder / "shards", setting.is_quick)
        self._write_prompter()

    def measure(self, decode_on: str) -> Sequence[Row]:
        """Trains for some steps; rows of those behind the warm-up."""
        is_quick = self._setting.is_quick
        prompter = {
            "checkpoint": str(self._folder / "prompter"),
            "precision": self._setting.precision,
            "deadline_s": 100,
        }
        if is_quick:
            prompter["placement"] = "inline"  # `prompter.py` starts the process, which takes long
        values = {
            "task": "pretrain",
            "prompter": prompter,
            "decode": {"device": decode_on, "num_workers": 0 if is_quick else 4},
        }
        num_steps = _NUM_WARMUP_STEPS + (2 if is_quick else 26)
        config = self._config(f"pretrain-{decode_on}", values, num_steps + 1)
        train_without_saving(config, num_steps)
        lines = read_metrics(config.run_dir)[_NUM_WARMUP_STEPS:]
        # With a line for each step the trainer waits for its GPU after each; that wait is part of the next one's time.
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
            "sources": [{"path": str(self._folder / "shards"), "kind": "video"}],
            "global_batch": 8 if is_quick else 64,
            "num_lanes": 4,
            "text": {"tokenizer": str(self._tokenizer), "num_tokens": self._num_tokens},
            "decode": values.pop("decode", {"num_workers": 0}),
        }
        engine = {"zero_stage": 0, "precision": self._setting.precision}
        run = {
            "run_dir": str(self._folder / name),
            "stream": stream,
            "model": self._model,
            "train": {"max_steps": num_steps, "checkpoint_every": 10**6, "rehearsal": False, "engine": engine},
            **values,
        }
        return validate(RunConfig, run, source=__name__)

    def _write_prompter(self) -> None:
        """A fresh one, as `alpro export` writes it."""
        tokenizer = Tokenizer(str(self._tokenizer), self._num_tokens)
        sizes = {"vocab_size": tokenizer.vocab_size, "num_tokens": self._num_tokens}
        description = validate(ModelDescription, {"task": "prompter", "model": self._model, **sizes}, source=__name__)
        write_model(self._folder / "prompter", description, description.build().state_dict(), tokenizer)


def write_shards(folder: Path, is_quick: bool) -> str:
    """Writes what is trained on; gives what that is."""
    if is_quick:
        write_dataset(folder, video_shards=(5, 9, 1, 9), size=64)
        return "made-up frames"
    try:
        write_clips(folder, example_frames(sum(_SHARDS) * _FRAMES_OF_A_CLIP))
    except LeftOutError as error:
        print(f"no frames of the example clips: {error}")
        write_dataset(folder, video_shards=_SHARDS, num_frames=_FRAMES_OF_A_CLIP, size=_STORED_SIZE)
        return "made-up frames"
    return "example clips"


def write_clips(folder: Path, jpegs: Sequence[bytes]) -> None:
    """A data set of clips with these stored frames, in turn and again from the first."""
    frames, numbers, infos = cycle(jpegs), count(), []
    folder.mkdir(parents=True)
    for shard, size in enumerate(_SHARDS):
        with ShardWriter(folder, f"video-{shard:06d}", "video") as writer:
            for number in islice(numbers, size):
                drawn = sample(number, "video", _FRAMES_OF_A_CLIP, size=16)
                writer.add(replace(drawn, frames=tuple(islice(frames, _FRAMES_OF_A_CLIP))))
            infos.append(writer.close())
    description = {"payload": "frames", "frames": {"size": _STORED_SIZE}}
    save_dataset_info(folder, DatasetInfo.of_shards(folder.name, description, infos))
    save_entities(folder / ENTITIES_FILE, [(noun, 4) for noun in NOUNS])


class _EnoughError(Exception):
    """The steps are made."""


def train_without_saving(config: RunConfig, num_steps: int) -> None:
    """Makes so many steps of a run that has at least one more, with their lines of metrics, and ends it there."""
    asked = count()

    def is_asked_to_stop() -> bool:
        # First when the run starts, then after each step and before its line.
        if next(asked) > num_steps:
            raise _EnoughError
        return False

    with suppress(_EnoughError):
        train(config, is_asked_to_stop)


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(line[name] for line in lines) / len(lines))
