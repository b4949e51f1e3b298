"""What `benchmarks/step.py` compares must be the same computation."""

import argparse

import pytest
import torch

from alpro_stream.errors import ConfigError
from alpro_stream.losses.objective import GlobalCounts, GlobalFeatures, SoftLabels, count_local, same_pairs
from benchmarks import literal
from benchmarks.harness import Target
from benchmarks.step import Step, _arguments, _describe, _goals, rows

ARGUMENTS = argparse.Namespace(batch=3, precision="fp32", small=True, compile=False)


@pytest.fixture
def step():
    step = Step(ARGUMENTS)
    for part in (step.model, step.prompter):
        part.eval()
        for name, parameter in part.named_parameters():
            if "temporal_fc" in name or "time_embed" in name:  # Fresh ones hide the temporal attention.
                torch.nn.init.normal_(parameter, std=0.1)
    return step


def test_literal_losses_and_gradients_equal_ours(step, monkeypatch):
    batch = step.inputs.batch
    labels = step.labeller(batch.frames_BTHWC, batch.boxes_B4, "video")
    literal_BM, keep_B = literal.soft_labels(step.prompter, step.inputs.bank_ME, batch)
    torch.testing.assert_close(labels.labels_BM, literal_BM)
    assert torch.equal(labels.keep_B, keep_B)
    keep_B = torch.tensor([True, False, True])  # The random prompter is sure of nothing.

    drawn = {}
    original = type(step.objective)._negatives
    monkeypatch.setattr(
        type(step.objective), "_negatives", lambda *a: drawn.setdefault("ours", original(*a)), raising=True
    )
    counts = GlobalCounts(*count_local(batch, SoftLabels(labels.labels_BM, keep_B)))
    ignore_GG = same_pairs(batch.video_id_B, batch.text_id_B)
    terms = step.objective(
        batch,
        lambda v, t: GlobalFeatures(v, t, ignore_GG, batch.valid_B, 0),
        1,
        counts,
        SoftLabels(labels.labels_BM, keep_B),
    )
    videos, texts, _ = drawn["ours"]
    monkeypatch.setattr(literal, "negatives", lambda similarity_BB: (videos.tolist(), texts.tolist()))
    values = literal.losses(step.model, batch, labels.labels_BM, keep_B)
    assert values.keys() == terms.values.keys()
    for name, value in values.items():
        torch.testing.assert_close(value.detach(), terms.values[name], msg=name)
    parameters = dict(step.model.named_parameters())
    ours = torch.autograd.grad(terms.total, list(parameters.values()))
    theirs = torch.autograd.grad(torch.stack(list(values.values())).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_literal_negatives_are_never_the_own_one():
    for _ in range(20):
        videos, texts = literal.negatives(torch.zeros(4, 4))
        assert all(index != chosen for chosen_list in (videos, texts) for index, chosen in enumerate(chosen_list))


def test_on_a_gpu_only_a_compiled_step_in_bf16_is_promised():
    def goals(precision, compile, small=False):
        return _goals("cuda", argparse.Namespace(precision=precision, compile=compile, small=small))

    assert goals("bf16", True) == (Target(at_least=3.0), None, Target(at_least=0.5))
    for other in (goals("fp32", True), goals("bf16", False), goals("bf16", True, small=True)):
        assert other == (None, None, None)


@pytest.mark.parametrize(
    ("on_gpu", "options", "measured"),
    [
        (True, [], {"batch": 64, "precision": "bf16", "compiled": True}),
        (True, ["--no-compile", "--batch=16"], {"batch": 16, "precision": "bf16", "compiled": False}),
        (False, [], {"batch": 4, "precision": "fp32", "compiled": False}),
        (False, ["--compile"], {"batch": 4, "precision": "fp32", "compiled": True}),
    ],
)
def test_what_was_measured_is_told(monkeypatch, on_gpu, options, measured):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    parser = argparse.ArgumentParser()
    _arguments(parser)
    assert _describe(parser.parse_args(options)) == measured


def test_a_batch_of_one_is_refused():
    with pytest.raises(ConfigError, match="--batch 1"):
        rows(argparse.Namespace(**vars(ARGUMENTS) | {"batch": 1}))
