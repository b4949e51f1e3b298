"""What the rows of the related work need: losses that are off, encoders that are not trained, at the size of a test."""

import json

import pytest
from safetensors.torch import load_file
from search_files import embed, make_root, write_tiny_model

from alpro_launch.cli import main as alpro
from alpro_stream.config import load_config, validate
from alpro_stream.errors import CheckpointError
from alpro_stream.evaluate.offline_features import OfflineConfig, learn_offline
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.model.folder import read_description
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics

# What each baseline's file says beside data, sizes and schedule.
LOSSES = {
    "fit": {"vtc"},
    "mlm_vtm": {"vtm", "mlm"},
    "clipbert": {"vtm"},
    "frozen_encoder": {"vtc", "vtm"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def tiny(corpus, run_dir, name, **changes):
    """The baseline's own task, losses, order and frozen parts, on a tiny model and corpus."""
    config = load_config(RunConfig, f"configs/baselines/{name}.yaml")
    own = {
        "task": config.task,
        "losses": config.losses.model_dump(),
        "frozen": list(config.frozen),
        "stream.unit": config.stream.unit,
        "stream.frames": config.stream.frames,
        "stream.crop_scale": config.stream.crop_scale,
        "stream.augment": config.stream.augment,
        "model.video.drop_path": config.model.video.drop_path,
        "train.max_steps": 2,
        "train.checkpoint_every": 1,
    }
    return validate(RunConfig, tiny_run(corpus, run_dir, {**own, **changes}), source="test")


@pytest.mark.parametrize("name", LOSSES)
def test_each_baseline_trains_with_its_losses_alone(corpus, tmp_path, name):
    config = tiny(corpus, tmp_path, name)
    finished = train(config)
    assert {key for key in read_metrics(tmp_path)[-1] if key.startswith("loss/")} == {
        f"loss/{loss}" for loss in LOSSES[name]
    }
    assert read_description(finished.checkpoint).task == config.task


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_frozen_encoder_stays_as_it_is_and_the_run_goes_on(corpus, tmp_path, stage):
    changes = {"train.engine.zero_stage": stage, "train.keep_checkpoints": 5}
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    train(tiny(corpus, whole, "frozen_encoder", **changes))
    train(tiny(corpus, cut, "frozen_encoder", **changes), lambda: True)
    train(tiny(corpus, cut, "frozen_encoder", **changes))
    first, last = (load_file(folder / WEIGHTS_FILE) for folder in complete_checkpoints(whole))
    again = load_file(complete_checkpoints(cut)[-1] / WEIGHTS_FILE)
    frozen = {name for name in first if name.startswith("dual.video_encoder.")}
    assert all(first[name].equal(last[name]) for name in frozen)
    trained = {name for name in first if name not in frozen and not first[name].equal(last[name])}
    assert any(name.startswith("dual.text_encoder.") for name in trained)
    assert any(name.startswith("multimodal.") for name in trained)
    assert all(again[name].equal(last[name]) for name in last)


def test_offline_features_are_learnt_from_an_index_and_evaluated_like_any_model(tmp_path, capsys):
    make_root(tmp_path)
    changes = [f"{name}={tmp_path / folder}" for name, folder in (("checkpoint", "model"), ("out", "fitted"))]
    changes += [f"index={tmp_path / 'index'}", "num_steps=1500", "learning_rate=3e-3"]
    command = ["fit", "configs/baselines/frozen_features.yaml", *changes]
    assert alpro(command) == 0
    assert f"written: {tmp_path / 'fitted'}" in capsys.readouterr().out

    before, after = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("model", "fitted"))
    changed = {name for name, weight in after.items() if not weight.equal(before[f"dual.{name}"])}
    assert changed == {
        *(f"{kind}_projection.{part}" for kind in ("video", "text") for part in ("weight", "bias")),
        "raw_temperature",
    }

    def mean_rank(model):
        out = tmp_path / f"{model}_evaluation"
        data = [f"sources=[{{path: {tmp_path / 'corpus/train'}}}]", "decode.num_workers=0", "scores=[vtc]"]
        changes = [f"checkpoint={tmp_path / model}", f"out={out}", "num_frames=null", "num_tokens=null", *data]
        assert alpro(["evaluate", "configs/evaluate/tiny_retrieval.yaml", *changes]) == 0
        return json.loads((out / "result.json").read_text())["metrics"]["vtc"]["text_to_video"]["mean_rank"]

    assert mean_rank("fitted") < 0.4 * mean_rank("model")
    assert alpro(command) == CONFIGURATION
    assert "fitted exists; remove it, or set another out" in capsys.readouterr().err


def test_what_is_learnt_on_features_is_what_the_model_gives(tmp_path):
    """The maps are folded into the projections exactly: its own features have the loss of the last step."""
    make_root(tmp_path)
    config = {"checkpoint": tmp_path / "model", "index": tmp_path / "index", "batch_size": 1000}
    ten, eleven = (
        learn_offline(OfflineConfig.model_validate({**config, "num_steps": steps, "out": tmp_path / f"after_{steps}"}))
        for steps in (10, 11)
    )
    assert eleven[:10] == ten, "the same every time"
    embed(tmp_path, checkpoint=tmp_path / "after_10", out=tmp_path / "index_after")
    again = {"checkpoint": tmp_path / "after_10", "index": tmp_path / "index_after", "batch_size": 1000, "num_steps": 1}
    (first,) = learn_offline(OfflineConfig.model_validate({**again, "out": tmp_path / "again"}))
    assert first == pytest.approx(eleven[10], rel=1e-4)
    assert first < 0.95 * ten[0]


def test_offline_features_of_another_model_are_refused(tmp_path):
    make_root(tmp_path)
    other = write_tiny_model(tmp_path / "other", tmp_path / "corpus", seed=1)
    config = {"checkpoint": other, "index": tmp_path / "index", "out": tmp_path / "fitted"}
    with pytest.raises(CheckpointError, match="was made by"):
        learn_offline(OfflineConfig.model_validate(config))
    assert not (tmp_path / "fitted").exists()


def test_a_run_does_not_go_on_with_other_parts_frozen(corpus, tmp_path):
    train(tiny(corpus, tmp_path, "frozen_encoder", **{"train.max_steps": 1}))
    with pytest.raises(CheckpointError, match="frozen: "):
        train(tiny(corpus, tmp_path, "frozen_encoder", frozen=[]))
