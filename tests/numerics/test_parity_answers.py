"""The question answering model against the reference, with weights of its own and of pre-training."""

from functools import cache

import pytest
import torch
from parity_files import arrays, meta
from reference_models import (
    CONFIG,
    SIZES,
    assert_parity,
    each_dtype,
    each_output,
    inputs,
    pixels,
    reference_file,
    reference_model,
)

from alpro_stream.errors import CheckpointError
from alpro_stream.losses.answers import answer_loss
from alpro_stream.model.loading import load_by_name


def logits_of(model, dtype):
    ids_BL, mask_BL = inputs("qa_tiny", "ids", "mask")
    video_BND, _ = model.dual.encode_video(pixels("qa", dtype))
    text_BLD, _ = model.dual.encode_text(ids_BL, mask_BL)
    return model.answer_logits(model.multimodal(text_BLD, mask_BL, video_BND, num_tokens=1)[:, 0])


def from_pretraining(dtype):
    """A question answering model whose encoders come from a pre-training file; the head stays as it was."""
    model = reference_model("qa", dtype)
    parameters, skipped = reference_file("pretrain").parameters("question_answering", CONFIG)
    report = load_by_name(model, parameters, "pretrain.pt", skipped=skipped, fresh=("answer_head",))
    assert set(report.missing) == {name for name in model.state_dict() if name.startswith("answer_head.")}
    return model


@cache
@torch.no_grad()
def answers(dtype):
    logits_BA = logits_of(reference_model("qa", dtype), dtype)
    return {
        "out.logits": logits_BA,
        "out.loss": answer_loss(logits_BA, inputs("qa_tiny", "labels")[0]),
        "out.from_pretrain.logits": logits_of(from_pretraining(dtype), dtype),
    }


@each_dtype
@each_output("qa_tiny")
def test_answers(dtype, output):
    assert_parity(answers(dtype), "qa_tiny", output, dtype)


def test_loss_in_full_precision():
    assert answers(torch.float64)["out.loss"].item() == pytest.approx(meta("qa")["loss"], rel=1e-9)


def test_the_two_sets_of_weights_differ():
    """Their question answering model names its text encoder otherwise, so the recipe gives it other values."""
    found = arrays("qa_tiny")
    assert abs(found["out.logits"] - found["out.from_pretrain.logits"]).max() > 0.1
    assert found["out.logits"].shape == (SIZES["batch"], SIZES["answers"])


def test_a_head_that_is_not_declared_as_fresh_is_missed():
    parameters, _ = reference_file("pretrain").parameters("question_answering", CONFIG)
    with pytest.raises(CheckpointError, match=r"answer_head.0.weight, .* not in it"):
        load_by_name(reference_model("qa", torch.float32), parameters, "pretrain.pt")
