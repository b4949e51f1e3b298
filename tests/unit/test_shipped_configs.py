"""What the configurations of one kind have in common; tests/unit/test_cli.py loads every one of them."""

import json
from pathlib import Path

import pytest

from alpro_launch.evaluate import load_evaluation
from alpro_stream.config import differences, load_config
from alpro_stream.run import RunConfig

STAGES = ("prompter", "pretrain")
FINETUNED = ("msrvtt_retrieval", "didemo_retrieval", "msrvtt_qa", "msvd_qa")
PUBLISHED = json.loads((Path(__file__).parents[1] / "numerics/parity/facts.json").read_text())


def differing(stage, name, published="webvid_cc3m"):
    """Keys in which a configuration differs from the published run."""
    one, published = (load_config(RunConfig, f"configs/{stage}/{file}.yaml") for file in (name, published))
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
    scales += ("prompter.precision", "prompter.compile", "prompter.deadline_s")
    found = differing(stage, "tiny")
    assert {key for key in found if not key.startswith((*sizes, *places, *scales))} == set()
    assert not {"model.text.dropout", "model.video.drop_path", "model.temperature", "model.video.still"} & found


@pytest.mark.parametrize("name", FINETUNED)
def test_fine_tuning_has_the_published_settings(name):
    facts, config = PUBLISHED["runs"][name], load_config(RunConfig, f"configs/finetune/{name}.yaml")
    stream, train = config.stream, config.train
    batch = facts["batch_per_process"] * facts["processes"] * facts["accumulation"]
    assert stream.global_batch == batch
    assert train.engine.num_micro_batches == facts["accumulation"]
    assert train.engine.activation_checkpointing == facts["visual_checkpointing"]
    optimizer = train.optimizer
    names = ("learning_rate", "clip_norm", "warmup_ratio", "configured_weight_decay")
    found = (optimizer.learning_rate, optimizer.max_grad_norm, optimizer.warmup_ratio, optimizer.weight_decay)
    assert found == tuple(facts[name] for name in names)
    assert (train.epochs, stream.seed) == (facts["epochs"], facts["seed"])
    assert (config.model.video.num_frames, stream.text.num_tokens) == (facts["frames"], facts["text_length"])
    assert config.model.video.image_size == facts["image"]
    assert (stream.frames, stream.crop_scale, config.losses.vtc, config.losses.vtm) == ("random", 1.0, 1, 1)
    assert stream.augment == ("published" if name.endswith("qa") else "none")
    if name.endswith("retrieval"):  # Negatives come from what one process had.
        assert stream.flip_probability == 0
        assert batch // stream.num_lanes == facts["batch_per_process"]


@pytest.mark.parametrize(("tiny", "full"), [("tiny_retrieval", "msrvtt_retrieval"), ("tiny_qa", "msrvtt_qa")])
def test_the_tiny_twins_are_fine_tuned_as_published(tiny, full):
    sizes = ("model.", "stream.sources", "stream.global_batch", "stream.num_lanes", "stream.text.", "answers.num")
    places = ("work_dir", "run_dir", "start_from", "stream.decode.", "train.engine.")
    scales = ("train.checkpoint_every", "train.optimizer.learning_rate", "train.epochs")
    found = differing("finetune", tiny, full)
    assert {key for key in found if not key.startswith((*sizes, *places, *scales))} == set()
    assert not {"model.text.dropout", "model.video.drop_path", "model.temperature"} & found


@pytest.mark.parametrize(
    ("evaluate", "finetune"),
    [
        ("msrvtt_1ka", "msrvtt_retrieval"),
        ("msrvtt_full", "msrvtt_retrieval"),
        ("didemo", "didemo_retrieval"),
        ("msvd", "msvd_retrieval"),
        ("msrvtt_qa", "msrvtt_qa"),
        ("msvd_qa", "msvd_qa"),
        ("tiny_qa", "tiny_qa"),
        ("tiny_retrieval", "tiny_retrieval"),
    ],
)
def test_an_evaluation_takes_the_run_of_its_data_set(evaluate, finetune):
    run = load_config(RunConfig, f"configs/finetune/{finetune}.yaml")
    config = load_evaluation(f"configs/evaluate/{evaluate}.yaml", [])
    assert (config.checkpoint, config.task) == (run.run_dir, run.task)
    assert config.num_frames in (None, run.model.video.num_frames)
    assert config.num_tokens in (None, run.stream.text.num_tokens)
