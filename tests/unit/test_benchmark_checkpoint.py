"""`benchmarks/checkpoint.py` saves and loads by the trainer's own code."""

import argparse
from contextlib import closing

import pytest
import torch

from alpro_stream.config import validate
from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.model.alpro import ModelConfig
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.distributed import join_world
from benchmarks import checkpoint


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    monkeypatch.setattr(checkpoint, "VOCAB_SIZE", 300)
    monkeypatch.setattr(checkpoint, "NUM_ENTITIES", 5)


def test_every_size_and_stage_has_its_rows_beside_their_limits(tmp_path, capsys):
    arguments = argparse.Namespace(quick=True, repetitions=None, folder=tmp_path / "new")
    rows = checkpoint.rows(arguments)
    assert [row.name for row in rows] == [
        f"{what}, tiny, ZeRO {stage}" for stage in (0, 1) for what in ("save", "load", "the trainer waits")
    ]
    assert all(row.value > 0 and row.limit > 0 and row.limit_of for row in rows)
    save = rows[0].details
    assert {"MB", "engine s", "model s", "flush s", "digests s"} == save.keys()
    waits = rows[2].value
    assert rows[0].value * waits == pytest.approx(save["MB"], rel=1e-6), "one repetition: the same save"
    assert sum(seconds for name, seconds in save.items() if name != "MB") < waits
    assert list(arguments.folder.iterdir()) == [], "all of it is gone"
    content = checkpoint._describe(arguments)
    assert content == {"tiny_million_parameters": 0.1, "vocab_size": 300, "entities": 5}


@pytest.mark.parametrize("stage", [0, 1])
def test_what_was_saved_is_what_is_loaded(tmp_path, stage):
    config = validate(ModelConfig, TINY_MODEL, source="test")
    saved = checkpoint.build(tmp_path, config, stage, join_world(60))
    with closing(saved.engine):
        assert saved.save() > 0
        assert saved.save() > 0
        assert complete_checkpoints(tmp_path) == [saved.newest], "older ones are removed, as in training"
        before = {name: tensor.clone() for name, tensor in saved.engine.module.state_dict().items()}
        saved.engine.backward(saved.engine())
        saved.engine.step(1e-2)
        assert any(not torch.equal(before[name], t) for name, t in saved.engine.module.state_dict().items())
        assert saved.load() > 0
        assert all(torch.equal(before[name], t) for name, t in saved.engine.module.state_dict().items())
        (saved.newest / "engine" / "more").write_text("x")
        with pytest.raises(CheckpointError, match="is no file of the checkpoint"):
            saved.load()


def test_a_size_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    need = 4 * 1000
    assert checkpoint.lack_of_room(1000, memory=8 * need, disk=14 * need) == ""
    assert "of memory are needed" in checkpoint.lack_of_room(1000, memory=8 * need - 1, disk=10**12)
    assert "of disk are needed" in checkpoint.lack_of_room(1000, memory=10**12, disk=14 * need - 1)
    monkeypatch.setattr(checkpoint, "lack_of_room", lambda *free: "no room")
    with pytest.raises(ConfigError, match="choose another with --folder"):
        checkpoint.rows(argparse.Namespace(quick=True, repetitions=1, folder=tmp_path))
    assert "left out: tiny: no room" in capsys.readouterr().out
