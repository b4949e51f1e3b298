"""What the rows of the related work need: losses that are off, encoders that are not trained, at the size of a test."""

import pytest
from safetensors.torch import load_file

from alpro_stream.config import load_config, validate
from alpro_stream.errors import CheckpointError
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
    "frozen_features": {"vtc", "vtm"},
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
    train(tiny(corpus, whole, "frozen_features", **changes))
    train(tiny(corpus, cut, "frozen_features", **changes), lambda: True)
    train(tiny(corpus, cut, "frozen_features", **changes))
    first, last = (load_file(folder / WEIGHTS_FILE) for folder in complete_checkpoints(whole))
    again = load_file(complete_checkpoints(cut)[-1] / WEIGHTS_FILE)
    frozen = {name for name in first if name.startswith("dual.video_encoder.")}
    assert all(first[name].equal(last[name]) for name in frozen)
    trained = {name for name in first if name not in frozen and not first[name].equal(last[name])}
    assert any(name.startswith("dual.text_encoder.") for name in trained)
    assert any(name.startswith("multimodal.") for name in trained)
    assert all(again[name].equal(last[name]) for name in last)


def test_a_run_does_not_go_on_with_other_parts_frozen(corpus, tmp_path):
    train(tiny(corpus, tmp_path, "frozen_features", **{"train.max_steps": 1}))
    with pytest.raises(CheckpointError, match="frozen: "):
        train(tiny(corpus, tmp_path, "frozen_features", frozen=[]))
