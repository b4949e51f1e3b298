"""Rehearsal, validation and divergence in whole runs: looking at a run never changes it."""

import math

import pytest
import torch
from dying_runs import assert_same_run, config, metrics_of

import alpro_stream.train.rehearsal
from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.run import train
from alpro_stream.shards.reader import ShardReader
from alpro_stream.testing.configs import write_corpus
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.testing.shards import write_dataset
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics

PRELOAD = ["alpro_stream.run"]
SAME_ON_ALL_RANKS = {"model.text.dropout": 0, "model.video.drop_path": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    write_dataset(root / "held_out", video_shards=(5, 6), image_shards=(9,), size=64)
    return root


@pytest.fixture(scope="module")
def pretrain(corpus, tmp_path_factory):
    prompter = train(config(corpus, tmp_path_factory.mktemp("prompter"), **{"train.max_steps": 1})).checkpoint
    return {
        "task": "pretrain",
        "prompter.checkpoint": str(prompter),
        "prompter.placement": "inline",
        "losses.pem.threshold": 0.1,
        "train.max_steps": 4,
    }


def validated(corpus, **changes):
    return {"validation": {"sources": [{"path": str(corpus / "held_out")}], "every": 2, **changes}}


def without_validation(run_dir):
    return [
        {name: value for name, value in line.items() if not name.startswith("validation/")}
        for line in metrics_of(run_dir)
    ]


@pytest.fixture(scope="module")
def plain(corpus, pretrain, tmp_path_factory):
    run = config(corpus, tmp_path_factory.mktemp("plain"), **pretrain)
    train(run)
    return run.run_dir


def test_a_rehearsal_leaves_the_run_as_it_was(corpus, pretrain, plain, tmp_path):
    train(config(corpus, tmp_path, **pretrain, **{"train.rehearsal": True}))
    assert_same_run(tmp_path, plain)


def test_a_rehearsal_makes_a_step_of_each_kind_and_before_anything_is_read(corpus, pretrain, tmp_path, monkeypatch):
    kinds = []

    def rehearsed(module, batches, num_entities, *rest):
        kinds.extend((batch.kind, batch.frames_BTHWC.shape[1], num_entities > 0) for batch in batches)
        raise AlproError("does not fit")

    monkeypatch.setattr("alpro_stream.run.rehearse", rehearsed)
    with pytest.raises(AlproError, match="does not fit"):
        train(config(corpus, tmp_path, **pretrain, **{"train.rehearsal": True}))
    assert kinds == [("video", 2, True), ("image", 1, True)]
    assert read_metrics(tmp_path) == []


def test_what_does_not_fit_says_what_to_change(corpus, pretrain, tmp_path, monkeypatch):
    """Memory of a GPU, which is not here: its error is."""

    class Full(alpro_stream.train.rehearsal.Step):
        def train(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr("alpro_stream.train.rehearsal.Step", Full)
    with pytest.raises(AlproError, match=r"a step of 8 samples a rank does not fit.*2\.00 GiB.*num_micro_batches"):
        train(config(corpus, tmp_path, **pretrain, **{"train.rehearsal": True}))


def test_validation_leaves_the_run_as_it_was_and_is_written(corpus, pretrain, plain, tmp_path):
    train(config(corpus, tmp_path, **pretrain, **validated(corpus), **{"train.log_every": 1}))
    assert without_validation(tmp_path) == metrics_of(plain)
    lines = read_metrics(tmp_path)
    assert ["validation/vtc" in line for line in lines] == [False, True, False, True]
    names = {name.removeprefix("validation/") for name in lines[1] if name.startswith("validation/")}
    directions = ("text_to_video", "video_to_text")
    figures = {f"{direction}_{what}" for direction in directions for what in ("r1", "r5", "median_rank")}
    assert names == {"vtc", "vtm", "mlm"} | figures
    assert all(math.isfinite(value) for name, value in lines[1].items() if name.startswith("validation/"))
    assert lines[1]["validation/vtc"] != lines[3]["validation/vtc"]


def validation_of_ranks(corpus, run_dir, changes):
    train(config(corpus, run_dir, **changes))


@pytest.mark.parametrize(("stage", "num_clips"), [(1, 1000), (3, 7)])
def test_any_number_of_ranks_finds_the_same(corpus, pretrain, tmp_path, stage, num_clips):
    """20 clips on 2 ranks, and 7 of them, of which one rank has one less."""
    changes = {**pretrain, **SAME_ON_ALL_RANKS, **validated(corpus, num_clips=num_clips), "train.max_steps": 2}
    changes["train.engine.zero_stage"] = stage
    one, two = tmp_path / f"one-{num_clips}", tmp_path / f"two-{num_clips}"
    # In a process of its own: ZeRO 3 leaves traces in torch, which other tests would find.
    run_ranks(validation_of_ranks, 1, corpus, one, changes, preload=PRELOAD)
    run_ranks(validation_of_ranks, 2, corpus, two, changes, preload=PRELOAD)
    found, expected = read_metrics(two)[-1], read_metrics(one)[-1]
    names = [name for name in expected if name.startswith("validation/")]
    assert len(names) == 9
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_validation_can_be_of_losses_or_of_retrieval_alone(corpus, tmp_path):
    for number, (changes, names) in enumerate([({"num_clips": 0}, {"vtc"}), ({"num_batches": 0}, None)]):
        run = config(corpus, tmp_path / str(number), **validated(corpus, **changes), **{"train.max_steps": 2})
        train(run)
        found = {name.removeprefix("validation/") for name in read_metrics(run.run_dir)[-1] if "validation/" in name}
        assert found == names if names else "vtc" not in found and "text_to_video_r1" in found


def test_held_out_data_that_are_too_few_are_refused_before_training(corpus, tmp_path):
    write_dataset(corpus / "few", video_shards=(1,), image_shards=(), size=64)
    few = {"validation": {"sources": [{"path": str(corpus / "few")}]}}
    with pytest.raises(ConfigError, match=r"validation: .*validation\.num_batches=0 leaves its losses out"):
        train(config(corpus, tmp_path, **few))
    few["validation"]["num_batches"] = 0
    with pytest.raises(ConfigError, match=r"validation\.sources hold 1 clip"):
        train(config(corpus, tmp_path, **few))


def damaged(folder):
    """Overwrites the frames of a sample; gives its key."""
    reader = ShardReader(folder)
    shard = reader.info.shards[0].name
    with (folder / f"{shard}.tar").open("r+b") as file:
        for member in reader.frame_members(shard, 2):
            file.seek(member.offset)
            file.write(b"\0" * member.size)
    return reader.metadata(shard, 2).key


def test_a_damaged_held_out_clip_is_left_out_and_named(corpus, tmp_path, caplog):
    write_dataset(tmp_path / "held_out", video_shards=(5, 6), image_shards=(), size=64)
    key = damaged(tmp_path / "held_out")
    sources = {"sources": [{"path": str(tmp_path / "held_out")}], "num_batches": 0}
    train(config(corpus, tmp_path / "run", **validated(corpus, **sources), **{"train.max_steps": 2}))
    assert "validation/text_to_video_r1" in read_metrics(tmp_path / "run")[-1]
    assert f"validation leaves out video-000000:2 {key}: it cannot be decoded" in caplog.text


def test_what_goes_wrong_in_a_look_does_not_cost_the_step(corpus, tmp_path, monkeypatch):
    def broken(self):
        raise AlproError("the held-out data are gone")

    monkeypatch.setattr("alpro_stream.evaluate.validation.Validator.__call__", broken)
    with pytest.raises(AlproError, match="are gone"):
        train(config(corpus, tmp_path, **validated(corpus), **{"train.max_steps": 4, "train.checkpoint_every": 2}))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002"]


def test_a_run_that_is_asked_to_stop_does_not_look_before_it_ends(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("alpro_stream.evaluate.validation.Validator.__call__", lambda self: pytest.fail("looked"))
    run = config(corpus, tmp_path, **validated(corpus, every=1), **{"train.max_steps": 4})
    assert train(run, lambda: True).was_stopped
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001"]


def test_a_jump_ends_the_run_again_when_it_is_started_again(corpus, tmp_path):
    """What is usual is known from the sittings before."""
    steps = {"train.max_steps": 20, "train.checkpoint_every": 2, "train.log_every": 1}
    train(config(corpus, tmp_path, **{**steps, "train.max_steps": 14}))
    factor = 1 + 1e-6
    stop = {"train.divergence.on_spike": "stop", "train.divergence.spike": factor, "train.divergence.window": 10}
    for _ in range(2):
        with pytest.raises(AlproError, match="times its usual"):
            train(config(corpus, tmp_path, **steps, **stop, **{"train.optimizer.learning_rate": 3.0}))


def test_a_loss_that_is_no_number_ends_the_run_or_is_said(corpus, tmp_path, caplog):
    broken = {"train.optimizer.learning_rate": 1e30, "train.max_steps": 4, "train.checkpoint_every": 1}
    with pytest.raises(AlproError, match=r"step \d cannot be used: .* is (nan|inf).*stream\.skip_steps=\[\["):
        train(config(corpus, tmp_path / "stop", **broken))
    train(config(corpus, tmp_path / "warn", **broken, **{"train.divergence.on_nan": "warn"}))
    assert len(read_metrics(tmp_path / "warn")) == 4
    # The first step is made with a warm-up's rate of its own; what follows is of no use, and not saved.
    steps = [line["step"] for line in read_metrics(tmp_path / "stop")]
    assert [path.name for path in complete_checkpoints(tmp_path / "stop")] == [f"step-{s:06d}" for s in steps[:-1]][-2:]
