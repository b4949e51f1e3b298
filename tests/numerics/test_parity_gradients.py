"""Gradients of every parameter against the reference's, and activation checkpointing, which lost some of theirs."""

import json
from functools import cache

import pytest
import torch
from parity_files import PARITY, arrays, assert_close, meta
from reference_models import (
    SIZES,
    each_dtype,
    inputs,
    pixels,
    pretraining_batch,
    reference_model,
    reference_tensors,
    soft_labels,
    terms_of,
)
from torch.nn.functional import cross_entropy

from alpro_stream.model.checkpointing import set_checkpointing
from alpro_stream.model.reference_names import to_reference

STORED = json.loads((PARITY / "gradients_tiny.json").read_text())
NORMS = STORED["norms"]
NORM_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-7}
NONE = {"vtc": 0.0, "vtm": 0.0, "mlm": 0.0, "pem": {"weight": 0.0}}
SETTINGS = {
    "vtc": NONE | {"vtc": 1.0},
    "vtm": NONE | {"vtm": 1.0},
    "mlm": NONE | {"mlm": 1.0},
    "pem": NONE | {"pem": {"weight": 1.0}},
    "pem_paper": NONE | {"pem": {"weight": 1.0}},
    "total": {},
    "total_paper": {},
}
"""The columns of the stored norms, and which losses have a weight."""
WORDS = "text_encoder.bert.embeddings.word_embeddings.weight"

each_column = pytest.mark.parametrize("column", SETTINGS)


def their_names(model, task):
    """Our names of a model's parameters, each with the reference's."""
    numbered = {name: torch.full_like(p, number) for number, (name, p) in enumerate(model.named_parameters())}
    theirs = to_reference(numbered, task, SIZES["fusion_layer"])
    names = list(numbered)
    # What the reference stores twice has the number of its first name; position ids are no parameters.
    found = {
        n: names[int(t.flatten()[0])] for n, t in theirs.items() if ".decoder." not in n and "position_ids" not in n
    }
    assert sorted(found.values()) == sorted(names)
    return found


def gradients_of(model, task):
    """By the reference's names; None where no path leads."""
    parameters = dict(model.named_parameters())
    return {theirs: parameters[ours].grad for theirs, ours in their_names(model, task).items()}


@cache
def gradients(dtype, column):
    model = reference_model("pretrain", dtype)
    labels = soft_labels(dtype, "paper" if column.endswith("paper") else "out")
    terms_of(model, pretraining_batch(), pixels("pretrain", dtype), labels, **SETTINGS[column]).total.backward()
    return gradients_of(model, "pretrain")


@each_dtype
@each_column
def test_norms(dtype, column):
    found = gradients(dtype, column)
    expected = {name: norms[column] for name, norms in NORMS.items()}
    assert found.keys() == expected.keys()
    assert {name for name, gradient in found.items() if gradient is None} == {n for n in found if expected[n] is None}
    largest = max(filter(None, expected.values()))
    for name, norm in expected.items():
        if norm is None:
            continue
        ours = found[name].norm().item()
        if norm == 0:
            # What is added to all scores of a softmax does not change it.
            assert name.endswith("key.bias")
            assert ours < NORM_TOLERANCES[dtype] * largest
        else:
            assert ours == pytest.approx(norm, rel=NORM_TOLERANCES[dtype]), name


@each_dtype
@pytest.mark.parametrize("name", [key.removeprefix("grad.") for key in arrays("pretrain_tiny") if key[:5] == "grad."])
def test_whole_gradients(dtype, name):
    found, expected = gradients(dtype, "total")[name], arrays("pretrain_tiny")[f"grad.{name}"]
    assert_close(found.reshape(expected.shape), expected, {torch.float32: 1e-4, torch.float64: 1e-6}[dtype])


def test_what_no_loss_reaches_is_no_parameter_of_ours():
    """Their optimizer holds the frozen prompter, and classes that nothing reads."""
    ours = their_names(reference_model("pretrain", torch.float32), "pretrain").keys()
    buffers_and_second_names = {
        name
        for name in reference_tensors("pretrain")
        if ".decoder." in name or name.endswith(("position_ids", "_prompt_feat"))
    }
    assert ours.isdisjoint(STORED["without_gradient"])
    assert ours | set(STORED["without_gradient"]) == reference_tensors("pretrain").keys() - buffers_and_second_names


def test_padding_is_trained_by_the_mlm_decoder_alone():
    """Word embeddings and decoder are one matrix; its row 0 is read on padded positions, which nothing attends to."""
    for column in ("vtc", "vtm", "pem"):
        gradient = gradients(torch.float64, column)[WORDS]
        assert (gradient[0] == 0).all()
        assert gradient[SIZES["first_word"] :].abs().max() > 0
    assert gradients(torch.float64, "mlm")[WORDS][0].norm() > 1e-3
    assert_close(gradients(torch.float64, "total")[WORDS][0], gradients(torch.float64, "mlm")[WORDS][0], 1e-12)


LOST = set(meta("checkpointing")["without_gradient_when_on"])
"""Weights that never learned with the authors' checkpointing on, as in both of their question answering runs."""


def answer_gradients(checkpointing, training):
    """Of the question answering loss, and how often a block was computed."""
    model = reference_model("qa", torch.float64).train(training)
    if training:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
            elif hasattr(module, "drop_prob"):
                module.drop_prob = 0.3
    set_checkpointing(model, checkpointing)
    calls = []
    for block in (model.dual.video_encoder.blocks[1], model.dual.text_encoder.layers[1], model.multimodal.layers[1]):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    ids_BL, mask_BL, labels_B = inputs("qa_tiny", "ids", "mask", "labels")
    torch.manual_seed(0)
    video_BND, _ = model.dual.encode_video(pixels("qa", torch.float64))
    text_BLD, _ = model.dual.encode_text(ids_BL, mask_BL)
    cls_BD = model.multimodal(text_BLD, mask_BL, video_BND, num_tokens=1)[:, 0]
    cross_entropy(model.answer_logits(cls_BD), labels_B).backward()
    return gradients_of(model, "question_answering"), len(calls)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_checkpointing_keeps_every_gradient(training):
    kept, num_calls = answer_gradients(False, training)
    again, num_calls_again = answer_gradients(True, training)
    assert (num_calls, num_calls_again) == (3, 6)
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        if gradient is None:
            assert again[name] is None
        else:
            assert_close(again[name], gradient, 1e-12)
    assert kept.keys() > LOST
    for name in LOST:
        assert again[name].norm() > 1e-4, name


def test_what_lost_its_gradient_is_every_attention_and_mlp_of_the_video_encoder():
    names = their_names(reference_model("qa", torch.float32), "question_answering")
    parts = (".attn.", ".temporal_attn.", ".mlp.")
    assert {name for name in names if name.startswith("visual_encoder.") and any(p in name for p in parts)} == LOST
    without = {name for name, gradient in answer_gradients(False, False)[0].items() if gradient is None}
    assert without == set(meta("checkpointing")["without_gradient_in_both"]) & names.keys()


def test_dropout_changes_the_gradients_compared():
    """Else training mode would have compared the same numbers again."""
    calm, noisy = answer_gradients(True, False)[0], answer_gradients(True, True)[0]
    assert not torch.allclose(calm["classifier.0.weight"], noisy["classifier.0.weight"], rtol=0.1)
