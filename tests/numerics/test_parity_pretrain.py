"""The pre-training step against the reference: through the objective itself, with the reference's negatives."""

from functools import cache

import numpy as np
import pytest
import torch
from parity_files import arrays, assert_close, meta
from reference_models import (
    ENTITIES,
    GRID,
    PATCH,
    RULES,
    as_frames,
    assert_parity,
    banks_of,
    calls_of,
    cropped_pixels,
    each_dtype,
    each_output,
    frozen_prompter,
    inputs,
    outputs_of,
    pixels,
    pixels_for_frames,
    pretraining_batch,
    reference_model,
    soft_labels,
    teacher,
    terms_of,
)
from torch.nn.functional import one_hot

from alpro_stream.losses.objective import ObjectiveConfig, PretrainObjective
from alpro_stream.losses.pem import PemConfig, box_to_mask
from alpro_stream.losses.vtm import sample_negatives
from alpro_stream.model.pixels import crop_outside_black, normalise
from alpro_stream.prompter.labels import Labeller

CASE = "pretrain_tiny"
LOSSES = ("vtc", "vtm", "mlm", "pem")


@cache
@torch.no_grad()
def step(dtype):
    """The losses and all that leads to them, by the names of the stored arrays."""
    model, batch, video_BTCHW = reference_model("pretrain", dtype), pretraining_batch(), pixels("pretrain", dtype)
    modules = {
        "out.video_embeds": model.dual.video_encoder,
        "out.text_embeds": model.dual.text_encoder,
        "out.vtm_logits": model.vtm_head,
        "out.mlm_logits": model.mlm_head,
        "out.pem_logits": model.pem_head,
    }
    with outputs_of(modules) as found, calls_of("sample_negatives", "vtm_loss") as calls:
        terms = {side: terms_of(model, batch, video_BTCHW, soft_labels(dtype, side)) for side in RULES}
    # Clean and masked text go through the encoder together.
    found["out.text_embeds"] = found["out.text_embeds"][: len(batch)]
    found["out.fusion"] = model.multimodal(found["out.text_embeds"], batch.mask_BL, found["out.video_embeds"])
    with pixels_for_frames(video_BTCHW):
        found["out.video_feat"], found["out.text_feat"] = PretrainObjective(model, ObjectiveConfig())(batch, None, 1)
    found["out.vtm_labels"] = calls["vtm_loss"][0][0][1]
    for similarity, weights, index, ((scores_1NN, allowed_1NN, _), (index_1N, _)) in zip(
        ("out.sim_t2v", "out.sim_v2t"),
        ("out.negative_video_weights", "out.negative_text_weights"),
        ("in.negative_video", "in.negative_text"),
        calls["sample_negatives"][:2],
        strict=True,
    ):
        found |= {similarity: scores_1NN[0], index: index_1N[0]}
        found[weights] = scores_1NN[0].masked_fill(~allowed_1NN[0], -torch.inf).softmax(dim=1)
    for name in LOSSES:
        found[f"out.{name}_loss"] = terms["out"].values[name]
    found["paper.pem_loss"] = terms["paper"].values["pem"]
    return found | teacher(dtype) | {f"{side}.total": one.total for side, one in terms.items()}


@each_dtype
@each_output(CASE)
def test_pretraining_step(dtype, output):
    assert_parity(step(dtype), CASE, output, dtype)


@each_dtype
@pytest.mark.parametrize("negative", ["in.negative_video", "in.negative_text"])
def test_the_injected_negatives_are_taken(dtype, negative):
    """Else the losses above would be those of others."""
    assert np.array_equal(step(dtype)[negative], arrays(CASE)[negative])


def test_losses_in_full_precision():
    """In float64 nothing is left of the difference but the order of sums."""
    found, published = step(torch.float64), meta("pretrain")["losses"]
    for name, value in published.items():
        ours = found[name if "." in name else f"out.{name}"].item()
        assert ours == pytest.approx(value, rel=1e-9), name
    without_pem = sum(published[f"{name}_loss"] for name in ("vtc", "vtm", "mlm"))
    assert found["out.total"].item() == pytest.approx(without_pem + published["pem_loss"], rel=1e-9)
    assert found["paper.total"].item() == pytest.approx(without_pem + published["paper.pem_loss"], rel=1e-9)


def test_the_two_ignore_rules_differ_here():
    assert not torch.equal(step(torch.float64)["out.pem_ignore"], step(torch.float64)["paper.pem_ignore"])


def test_patches_of_the_crop_are_theirs():
    boxes_B4, outside_BHW = inputs(CASE, "crop_box", "crop_mask")
    assert torch.equal(box_to_mask(boxes_B4, GRID), outside_BHW.flatten(1) == 0)


def test_crops_are_black_where_theirs_are():
    """Theirs is black before normalisation too; the frames are made so that ours normalises them to their pixels."""
    (boxes_B4,) = inputs(CASE, "crop_box")
    frames_BTHWC = as_frames(pixels("pretrain", torch.float32))
    found = normalise(crop_outside_black(frames_BTHWC, boxes_B4, PATCH))
    assert_close(found, cropped_pixels("pretrain", torch.float32), 1e-6)


@pytest.mark.parametrize("side", RULES)
def test_the_labeller_gives_their_soft_labels(side):
    """From frames and boxes: crop, black, normalisation, feature, bank, softmax and rule."""
    (boxes_B4,) = inputs(CASE, "crop_box")
    prompter = frozen_prompter(torch.float32)
    labeller = Labeller(prompter, banks_of(prompter, CASE), PemConfig(ignore=RULES[side]), PATCH)
    found = labeller(as_frames(pixels("pretrain", torch.float32)), boxes_B4, meta("pretrain")["kind"])
    assert labeller.num_entities == len(ENTITIES)
    assert_close(found.labels_BM, arrays(CASE)["out.pem_soft_labels"])
    assert np.array_equal(~found.keep_B, arrays(CASE)[f"{side}.pem_ignore"])


@pytest.mark.parametrize(
    ("similarity", "weights"),
    [("out.sim_t2v", "out.negative_video_weights"), ("out.sim_v2t", "out.negative_text_weights")],
)
def test_negatives_are_drawn_with_their_weights(similarity, weights):
    """As many draws as make a difference of 0.01 five standard deviations."""
    count, size = 62_500, len(arrays(CASE)[similarity])
    scores_KNN = torch.from_numpy(arrays(CASE)[similarity]).expand(count, -1, -1)
    noise_KNN = torch.empty(scores_KNN.shape).exponential_(generator=torch.Generator().manual_seed(0))
    index_KN, _ = sample_negatives(scores_KNN, ~torch.eye(size, dtype=torch.bool), noise_KNN)
    shares_NN = one_hot(index_KN, size).double().mean(dim=0)
    assert np.abs(shares_NN - arrays(CASE)[weights]).max() < 0.01
