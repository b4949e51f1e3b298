"""The pieces of the GPU benchmark at toy size on a CPU: every line of them but those of CUDA."""

import importlib
import math
from contextlib import closing
from functools import partial

import pytest
import torch
from stream_parts import open_maker, stream_config

import benchmarks.prompter
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.prompter.client import InlinePrompter
from alpro_stream.run import RunConfig
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.shards import write_tokenizer
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics
from benchmarks.gpu_pieces import decode, end_to_end
from benchmarks.gpu_pieces.budget import PIECES
from benchmarks.gpu_pieces.journal import Journal
from benchmarks.gpu_pieces.piece import LeftOutError, Setting, do, main
from benchmarks.harness import Row

QUICK = Setting(torch.device("cpu"), is_quick=True)
# ZeRO 3 changes functions of torch for good, which would be those of all other tests.
NOT_HERE = {"whole step, ZeRO 3"}
UNITS = {
    "limits": {"TFLOP/s", "GB/s"},
    "step": {"TFLOP/s"},
    "step_compiled": {"TFLOP/s", "x"},
    "prompter": {"clips/s", "labels/s", "x", "of the step"},
    "decode": {"clips/s"},
    "zero": {"TFLOP/s"},
    "end_to_end": {"clips/s", "of the step"},
}
RATIOS_ARE_AT_MOST_1 = {"step", "step_compiled", "zero"}


def test_every_piece_is_tried():
    assert {piece.name for piece in PIECES} - {"tests"} == set(UNITS)


class Beside:
    """The prompter's client without its process, which takes as long to start as all pieces together."""

    labels_s = 0.001

    def __init__(self, make_labeller, *arguments):
        self._inline = InlinePrompter(make_labeller())

    def submit(self, batch):
        self._inline.submit(batch)

    def collect(self, batch):
        return self._inline.collect(batch)

    def close(self):
        self._inline.close()


def rows_of(name, folder):
    parts = importlib.import_module(f"benchmarks.gpu_pieces.{name}").parts(QUICK)
    journal = Journal(folder)
    do({part: work for part, work in parts.items() if part not in NOT_HERE}, journal)
    record = journal.read()
    assert [(one.state, one.why) for one in record.outcomes] == [("done", "")] * len(record.names)
    return [row for outcome in record.outcomes for row in outcome.rows]


@pytest.mark.parametrize("name", UNITS)
def test_a_piece_measures_all_of_its_parts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(benchmarks.prompter, "PrompterClient", Beside)
    rows = rows_of(name, tmp_path / name)
    assert {row["unit"] for row in rows} == UNITS[name]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert math.isfinite(row["value"])
        assert row["value"] > 0 or row["unit"] == "of the step"
        assert row["target"] is None, "nothing is promised of toy sizes"


@pytest.mark.parametrize("name", sorted(RATIOS_ARE_AT_MOST_1))
def test_no_piece_is_far_above_its_limit(tmp_path, name):
    """With operations counted twice it would be, each time; once it may be, when the limit meets a slow moment."""

    def is_below(folder):
        ratios = [row["ratio"] for row in rows_of(name, folder) if row["ratio"] is not None]
        return max(ratios) < 1.5

    assert any(is_below(tmp_path / str(number)) for number in range(3))


def test_what_goes_wrong_with_a_part_is_told_and_the_rest_goes_on(tmp_path):
    def raises(error):
        def work():
            raise error

        return work

    journal, row = Journal(tmp_path / "piece"), Row(name="r", value=1.0, unit="x")
    parts = {
        "no module": raises(ModuleNotFoundError("No module named 'nvidia'", name="nvidia")),
        "no DALI": raises(ConfigError("NVIDIA DALI is not installed; install it")),
        "no encoder": raises(LeftOutError("no encoder")),
        "no memory": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 3 GiB")),
        "refused": raises(ConfigError("stream.decode.device is mixed")),
        "wrong": raises(RuntimeError("CUDA error: an illegal memory access\nCompile with")),
        "good": lambda: [row],
    }
    do(parts, journal)
    assert [(one.name, one.state, one.why) for one in journal.read().outcomes] == [
        ("no module", "left out", "needs nvidia, which is not installed"),
        ("no DALI", "left out", "NVIDIA DALI is not installed; install it"),
        ("no encoder", "left out", "no encoder"),
        ("no memory", "left out", "does not fit into the GPU's memory: CUDA out of memory. Tried to allocate"),
        ("refused", "failed", "stream.decode.device is mixed"),
        ("wrong", "failed", "RuntimeError: CUDA error: an illegal memory access"),
        ("good", "done", ""),
    ]
    do({**parts, "good": raises(AssertionError("done already"))}, journal)
    assert len(journal.read().outcomes) == len(parts)


def test_a_piece_that_cannot_be_imported_is_left_out(tmp_path, monkeypatch):
    def fails(name):
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")

    monkeypatch.setattr(importlib, "import_module", fails)
    main(["zero", "--device", "cpu", "--quick", "--journal", str(tmp_path / "zero")])
    (outcome,) = Journal(tmp_path / "zero").read().outcomes
    assert (outcome.name, outcome.state, outcome.why) == (
        "zero",
        "left out",
        "needs deepspeed, which is not installed",
    )


def test_the_made_up_videos_may_go_to_nvdec_and_move():
    import io

    from alpro_stream.media import FrameConfig, sparse_frames
    from alpro_stream.stream.nvdec import locate_video, nvdec_refusal

    for codec in ("h264", "hevc"):
        data = decode.made_up_video(codec, 5)
        located = locate_video(io.BytesIO(data), FrameConfig(), lambda count: range(count))
        assert located.facts.codec == codec
        assert nvdec_refusal(located.facts) is None
        first, last = sparse_frames(io.BytesIO(data), FrameConfig(fps=1000)).frames[0:5:4]
        assert abs(first.astype(int) - last).mean() > 5


def test_codecs_without_an_encoder_are_left_out(monkeypatch):
    monkeypatch.setattr(decode.av, "codecs_available", frozenset())
    with pytest.raises(LeftOutError, match="libx265"):
        decode.made_up_video("hevc", 5)


def test_it_trains_on_frames_of_the_example_clips_or_on_made_up_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(end_to_end, "_SHARDS", (6, 4))
    for name, folder in (("example clips", decode.EXAMPLES), ("made-up frames", tmp_path / "none")):
        monkeypatch.setattr(end_to_end, "example_frames", partial(decode.example_frames, folder=folder))
        root = tmp_path / name
        write_tokenizer(root / "tokenizer")
        assert end_to_end.write_shards(root / "train", is_quick=False) == name
        maker, plan = open_maker(stream_config(root))
        with closing(maker):
            batch = maker.make(plan, 0, range(4))
        assert batch.valid_B.all()
        assert len(batch.frames_BTHWC.flatten(1).unique(dim=0)) == 8, "each clip has frames of its own"


def test_a_measured_training_saves_nothing(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    changes = {"train.max_steps": 4, "train.checkpoint_every": 10}
    config = validate(RunConfig, tiny_run(corpus, tmp_path / "run", changes), source="test")
    end_to_end.train_without_saving(config, 3)
    assert [line["step"] for line in read_metrics(config.run_dir)] == [1, 2, 3]
    assert complete_checkpoints(config.run_dir) == []
