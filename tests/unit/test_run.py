"""A run's configuration, and what `train` refuses or reports."""

import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from alpro_stream.config import validate
from alpro_stream.errors import AlproError, CheckpointError, ConfigError
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.run import RunConfig, run_entities, train
from alpro_stream.shards.entities import save_entities
from alpro_stream.shards.storage import file_digest
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.train import restore
from alpro_stream.train.checkpoint import complete_checkpoints, read_state
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.restore import ensure_bank, load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prompter(corpus, tmp_path_factory):
    return train(run_of(corpus, tmp_path_factory.mktemp("prompter"), {"train.max_steps": 1})).checkpoint


def run_of(corpus, run_dir, changes):
    return validate(RunConfig, tiny_run(corpus, run_dir, changes), source="test")


def pretrain(prompter, **changes):
    return {"task": "pretrain", "prompter.checkpoint": str(prompter), "prompter.placement": "inline", **changes}


def test_pem_needs_a_prompter(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"PEM needs a prompter: set prompter\.checkpoint, or losses\.pem\.weight=0"):
        run_of(corpus, tmp_path, {"task": "pretrain"})
    assert not run_of(corpus, tmp_path, {"task": "pretrain", "losses.pem.weight": 0}).uses_pem


def test_vtm_needs_two_samples_in_a_lane(corpus, prompter, tmp_path):
    with pytest.raises(ConfigError, match=r"stream\.global_batch 4 over stream\.num_lanes 4 leaves one sample"):
        run_of(corpus, tmp_path, pretrain(prompter, **{"stream.global_batch": 4}))
    assert run_of(corpus, tmp_path, {"stream.global_batch": 4}).task == "prompter"


def test_captions_longer_than_the_text_encoder_are_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"num_tokens 600 is more than the 512 positions"):
        train(run_of(corpus, tmp_path, {"stream.text.num_tokens": 600}))


def test_micro_batches_must_divide_the_lanes_of_a_rank(corpus, tmp_path):
    run = run_of(corpus, tmp_path, {"train.engine.num_micro_batches": 3})
    with pytest.raises(ConfigError, match="num_micro_batches 3 does not divide the 4 lanes of a rank"):
        train(run)


def test_a_prompter_of_another_picture_size_is_refused(corpus, prompter, tmp_path):
    run = run_of(corpus, tmp_path, pretrain(prompter, **{"model.video.num_frames": 4}))
    with pytest.raises(CheckpointError, match="was trained with num_frames 2, this run has 4"):
        train(run)


def test_a_prompter_that_is_not_there_is_refused(corpus, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give an exported model, a run or a checkpoint"):
        train(run_of(corpus, tmp_path / "run", pretrain(tmp_path / "nothing")))


def test_entities_come_from_the_sources_or_from_a_file(corpus, prompter, tmp_path):
    run = run_of(corpus, tmp_path, pretrain(prompter, **{"prompter.num_entities": 3}))
    # The same file for both kinds counts once; equally frequent words come in the order of the alphabet.
    assert run_entities(run.prompter, run.stream) == ["bird", "boat", "car"]
    save_entities(tmp_path / "mine.json", [("cup", 9), ("zebra", 2)])
    own = run_of(corpus, tmp_path, pretrain(prompter, **{"prompter.entities": str(tmp_path / "mine.json")}))
    assert run_entities(own.prompter, own.stream) == ["cup", "zebra"]
    save_entities(tmp_path / "mine.json", [("cup", 9)])
    with pytest.raises(ConfigError, match="needs at least 2 entities, found 1 in"):
        run_entities(own.prompter, own.stream)


def test_the_prompt_bank_is_built_once(prompter, tmp_path, monkeypatch):
    path = ensure_bank(prompter, ["dog", "cat"], tmp_path, CPU)
    built = path.stat().st_mtime_ns
    monkeypatch.setattr(restore, "load_trained", None)  # The weights are not even read again.
    assert ensure_bank(prompter, ["dog", "cat"], tmp_path, CPU) == path
    assert path.stat().st_mtime_ns == built
    monkeypatch.undo()
    assert ensure_bank(prompter, ["dog", "boat"], tmp_path, CPU) != path


def test_a_damaged_prompt_bank_is_named(corpus, prompter, tmp_path):
    run = run_of(corpus, tmp_path, pretrain(prompter, **{"prompter.placement": "process"}))
    bank = ensure_bank(prompter, run_entities(run.prompter, run.stream), tmp_path / "prompter", CPU)
    os.truncate(bank, bank.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"{bank} cannot be read \(.*\): remove it, and it is made again"):
        train(run)


def test_a_prompter_whose_bytes_changed_labels_nothing(corpus, prompter, tmp_path):
    damaged = shutil.copytree(prompter, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    recorded = file_digest(weights)
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\x40")
    assert load_trained(damaged, CPU)  # It can be read.
    with pytest.raises(CheckpointError) as caught:
        train(run_of(corpus, tmp_path / "run", pretrain(damaged)))
    for text in (f"{weights} is damaged", file_digest(weights), recorded):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.optimizer.betas", ([1.0, 0.98], [0.9, -0.1], [0.9, math.nan])),
        ("train.optimizer.eps", (-1e-8, math.nan, math.inf)),
        ("train.optimizer.learning_rate", (math.inf,)),
        ("train.epochs", (math.inf, math.nan, 1e30)),
        ("train.max_steps", (10**30,)),
        ("train.timeout_s", (math.inf, math.nan, 1e30)),
        ("train.engine.num_threads", (1e30, 100_000)),
        ("train.divergence.window", (1e30,)),
        ("train.divergence.spike", (math.inf,)),
        ("stream.decode.deadline_s", (math.inf, 1e30)),
        ("prompter.deadline_s", (math.inf, math.nan, 1e30)),
        ("prompter.lookahead", (10**6, 1e30)),
        ("prompter.num_threads", (1e30, 100_000)),
    ],
)
def test_a_number_that_means_nothing_is_refused(corpus, tmp_path, key, values):
    for value in values:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            run_of(corpus, tmp_path, pretrain(tmp_path, **{key: value}))


def test_a_checkpoint_serves_by_itself(corpus, prompter, tmp_path):
    finished = train(run_of(corpus, tmp_path, pretrain(prompter, **{"train.max_steps": 1})))
    trained = load_trained(finished.checkpoint, CPU)
    run = run_of(corpus, tmp_path, pretrain(prompter))
    entities = run_entities(run.prompter, run.stream)
    assert trained.description.entities == tuple(entities)
    assert not trained.model.training
    state = read_state(finished.checkpoint)
    assert state["fingerprint"]["prompter"] == file_digest(prompter / WEIGHTS_FILE)
    assert state["weights_sha256"] == trained.weights_sha256 == file_digest(finished.checkpoint / WEIGHTS_FILE)


def test_bf16_trains_float32_weights_to_about_the_same_losses(corpus, prompter, tmp_path):
    lines = {}
    for precision in ("fp32", "bf16"):
        changes = pretrain(prompter, **{"train.max_steps": 2, "train.engine.precision": precision})
        finished = train(run_of(corpus, tmp_path / precision, {**changes, "losses.pem.threshold": 0.0}))
        lines[precision] = read_metrics(tmp_path / precision)
        weights = load_file(finished.checkpoint / WEIGHTS_FILE)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert all(tensor.isfinite().all() for tensor in weights.values())
    for step in (0, 1):
        for name in ("loss/vtc", "loss/vtm", "loss/mlm", "loss/pem"):
            exact, rounded = lines["fp32"][step][name], lines["bf16"][step][name]
            assert rounded == pytest.approx(exact, rel=0.05)
    assert lines["fp32"][0]["loss/mlm"] != lines["bf16"][0]["loss/mlm"]


def test_pem_with_no_confident_label_at_all_is_0_and_the_rest_goes_on(corpus, prompter, tmp_path):
    changes = pretrain(prompter, **{"train.max_steps": 2, "losses.pem.threshold": 1.0})
    train(run_of(corpus, tmp_path, changes))
    for line in read_metrics(tmp_path):
        assert line["loss/pem"] == line["pem/kept"] == 0
        assert math.isfinite(line["gradient_norm"])
        assert line["gradient_norm"] > 0


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(corpus, tmp_path, stage):
    changes = {
        "train.max_steps": 6,
        "train.checkpoint_every": 1,
        "train.log_every": 5,
        "train.optimizer.learning_rate": 1e30,
        "train.engine.zero_stage": stage,
    }
    with pytest.raises(AlproError, match=r"step \d cannot be used: .* is (nan|inf).*learning_rate"):
        train(run_of(corpus, tmp_path, changes))
    for checkpoint in complete_checkpoints(tmp_path):
        weights = load_file(checkpoint / WEIGHTS_FILE)
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_lines_of_metrics_follow_log_every_and_the_last_step(corpus, tmp_path):
    train(run_of(corpus, tmp_path, {"train.max_steps": 5, "train.log_every": 2, "train.checkpoint_every": 3}))
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 5]


@pytest.mark.parametrize("task", [pytest.param("prompter", marks=pytest.mark.slow), "pretrain"])
def test_checkpointing_and_compiling_change_no_loss(corpus, prompter, tmp_path, monkeypatch, task):
    changes = pretrain(prompter, **{"losses.pem.threshold": 0.0}) if task == "pretrain" else {}
    # Compiled dropout draws other numbers.
    changes |= {"train.max_steps": 2, "model.text.dropout": 0.0, "model.video.drop_path": 0.0}
    compile_function, compiled = torch.compile, []

    def trace_only(function, **options):
        """What inductor would make of the graph takes minutes."""
        compiled.append(options["fullgraph"])
        return compile_function(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace_only)
    switches = {"plain": {}, "checkpointing": {"train.engine.activation_checkpointing": True}}
    switches["both"] = {**switches["checkpointing"], "train.engine.compile": True}
    lines = {}
    for name, switch in switches.items():
        torch._dynamo.reset()
        train(run_of(corpus, tmp_path / name, {**changes, **switch}))
        lines[name] = read_metrics(tmp_path / name)
    assert compiled == [True] * (2 if task == "pretrain" else 1)
    assert len(lines["plain"]) == 2
    for step, line in enumerate(lines["plain"]):
        for key in [key for key in line if "loss/" in key] + ["gradient_norm"]:
            assert lines["checkpointing"][step][key] == line[key], key
            assert lines["both"][step][key] == pytest.approx(line[key], rel=1e-4), key
