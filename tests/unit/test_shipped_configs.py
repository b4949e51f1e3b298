"""What the configurations of one kind have in common; tests/unit/test_cli.py loads every one of them."""

import pytest

from alpro_stream.config import differences, load_config
from alpro_stream.run import RunConfig

STAGES = ("prompter", "pretrain")


def differing(stage, name):
    """Keys in which a configuration differs from the published run."""
    one, published = (load_config(RunConfig, f"configs/{stage}/{file}.yaml") for file in (name, "webvid_cc3m"))
    return {
        line.partition(":")[0] for line in differences(one.model_dump(mode="json"), published.model_dump(mode="json"))
    }


@pytest.mark.parametrize("stage", STAGES)
def test_one_gpu_computes_the_published_steps_in_parts(stage):
    folders = {"work_dir", "run_dir"} | ({"prompter.checkpoint"} if stage == "pretrain" else set())
    assert differing(stage, "webvid_cc3m_1gpu") - folders == {
        "train.engine.zero_stage",
        "train.engine.num_micro_batches",
    }
    config = load_config(RunConfig, f"configs/{stage}/webvid_cc3m_1gpu.yaml")
    # A micro-batch is what one of 16 GPUs has: lanes are never split.
    assert config.stream.num_lanes % config.train.engine.num_micro_batches == 0
    assert config.stream.global_batch / config.train.engine.num_micro_batches == 16


@pytest.mark.parametrize("stage", STAGES)
def test_the_tiny_twins_learn_as_published(stage):
    """Sizes and places differ; neither losses, mixture, augmentation, dropout nor order do."""
    sizes = ("model.", "stream.sources", "stream.global_batch", "stream.num_lanes", "stream.text.tokenizer")
    places = ("work_dir", "run_dir", "start_from", "prompter.checkpoint", "stream.decode.", "train.engine.")
    scales = ("train.checkpoint_every", "train.optimizer.learning_rate", "losses.pem.threshold")
    found = differing(stage, "tiny")
    assert {key for key in found if not key.startswith((*sizes, *places, *scales))} == set()
    assert not {"model.text.dropout", "model.video.drop_path", "model.temperature", "model.video.still"} & found
