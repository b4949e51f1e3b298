"""The prompter by itself and the PEM loss against the reference."""

from functools import cache

import numpy as np
import pytest
import torch
from parity import recipe
from parity_files import arrays, assert_close, meta
from reference_models import (
    GRID,
    LENGTH,
    PATCH,
    RULES,
    as_frames,
    assert_parity,
    banks_of,
    batch_of,
    cropped_pixels,
    each_dtype,
    each_output,
    inputs,
    pixels,
    pixels_for_frames,
    reference_model,
)

from alpro_stream.losses.objective import DualObjective, GlobalFeatures
from alpro_stream.losses.pem import PemConfig, box_to_mask, keep_and_renormalise, pem_loss, pool_region
from alpro_stream.losses.vtc import vtc_loss
from alpro_stream.prompter.labels import Labeller, entity_similarity

KINDS = ("video", "image")
NO_DUPLICATES = torch.zeros(5, 5, dtype=torch.bool)


@cache
@torch.no_grad()
def prompter(dtype):
    model = reference_model("prompter", dtype)
    ids_BL, mask_BL = inputs("prompter_tiny", "ids", "mask")
    crop_BE = model.video_feature(cropped_pixels("prompter", dtype))
    found = {"out.crop_feat": crop_BE}
    for kind, bank_ME in banks_of(model, "prompter_tiny").items():
        similarity_BM = entity_similarity(crop_BE, bank_ME, model.temperature())
        q_BM = similarity_BM.softmax(dim=1)
        found |= {
            f"out.{kind}_prompt_feat": bank_ME,
            f"out.{kind}_similarity": similarity_BM,
            f"out.{kind}_soft_labels": q_BM,
        }
        for side, rule in RULES.items():
            found[f"{side}.{kind}_ignore"] = ~keep_and_renormalise(q_BM, similarity_BM, rule, 0.2)[1]
    batch = batch_of(ids_BL, mask_BL, (torch.arange(5), torch.arange(5)))
    objective = DualObjective(model)
    with pixels_for_frames(pixels("prompter", dtype)):
        video_BE, text_BE = objective(batch, None, 1)
        terms = objective(batch, lambda video, text: GlobalFeatures(video, text, NO_DUPLICATES, batch.valid_B, 0), 1)
    sim_v2t = video_BE @ text_BE.T / model.temperature()
    assert torch.equal(terms.total, terms.values["vtc"])
    return found | {
        "out.v2t_log_prob": sim_v2t.log_softmax(dim=1),
        "out.t2v_log_prob": sim_v2t.T.log_softmax(dim=1),
        "out.vtc_loss": terms.total,
        "out.vtc_labels": targets_of(video_BE, text_BE, model.temperature()),
    }


def targets_of(video_BE, text_BE, temperature):
    """Which text the loss pulls towards each video: the one whose similarity it wants larger."""
    with torch.enable_grad():
        scores_BB = (video_BE @ text_BE.T / temperature).requires_grad_()
        identity = torch.eye(len(scores_BB), dtype=scores_BB.dtype)
        (gradient_BB,) = torch.autograd.grad(vtc_loss(scores_BB, identity, torch.ones(())), scores_BB)
    return gradient_BB.argmin(dim=1)


@each_dtype
@each_output("prompter_tiny")
def test_prompter(dtype, output):
    assert_parity(prompter(dtype), "prompter_tiny", output, dtype)


def test_contrastive_loss_in_full_precision():
    assert prompter(torch.float64)["out.vtc_loss"].item() == pytest.approx(meta("prompter")["vtc_loss"], rel=1e-9)


def test_the_mean_of_the_prompts_is_not_normalised_again():
    norms = prompter(torch.float64)["out.video_prompt_feat"].norm(dim=1)
    assert [norms.min().item(), norms.max().item()] == pytest.approx(
        meta("prompter")["video_prompt_row_norm"], rel=1e-9
    )
    assert norms.max() < 0.97


@pytest.mark.parametrize("side", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_labeller_takes_the_bank_of_the_kind(kind, side):
    (boxes_B4,) = inputs("prompter_tiny", "crop_box")
    model = reference_model("prompter", torch.float32)
    labeller = Labeller(model, banks_of(model, "prompter_tiny"), PemConfig(ignore=RULES[side]), PATCH)
    found = labeller(as_frames(pixels("prompter", torch.float32)), boxes_B4, kind)
    assert_close(found.labels_BM, arrays("prompter_tiny")[f"out.{kind}_soft_labels"])
    assert np.array_equal(~found.keep_B, arrays("prompter_tiny")[f"{side}.{kind}_ignore"])


@cache
def hidden_states(dtype):
    """Made-up output of the multimodal encoder: text, CLS, patches."""
    found = recipe.normal(meta("pem_unit")["hidden"], meta("pem_unit")["hidden_shape"])
    assert recipe.checksum(found) == meta("pem_unit")["hidden_values"]
    return torch.from_numpy(found).to(dtype)


@cache
@torch.no_grad()
def pem_unit(dtype):
    similarity_BM, boxes_B4 = inputs("pem_unit_tiny", "similarity", "crop_box")
    similarity_BM = similarity_BM.to(dtype)
    q_BM = similarity_BM.softmax(dim=1)
    patches_BPD = hidden_states(dtype)[:, LENGTH + 1 :]
    region_BD = pool_region(patches_BPD, box_to_mask(boxes_B4, GRID), "mean", "crop")
    logits_BM = reference_model("pretrain", dtype).entity_logits(region_BD)
    found = {"out.soft_labels": q_BM, "out.logits": logits_BM}
    for side, rule in RULES.items():
        labels_BM, keep_B = keep_and_renormalise(q_BM, similarity_BM, rule, 0.2)
        found |= {f"{side}.ignore": ~keep_B, f"{side}.loss": pem_loss(logits_BM, labels_BM, keep_B)}
    return found


@each_dtype
@each_output("pem_unit_tiny")
def test_pem(dtype, output):
    assert_parity(pem_unit(dtype), "pem_unit_tiny", output, dtype)


def test_pem_in_full_precision():
    assert pem_unit(torch.float64)["out.loss"].item() == pytest.approx(meta("pem_unit")["loss"], rel=1e-9)
    assert pem_unit(torch.float64)["paper.loss"].item() == pytest.approx(meta("pem_unit")["paper_loss"], rel=1e-9)


def test_patches_of_the_crop_are_theirs():
    boxes_B4, outside_BHW = inputs("pem_unit_tiny", "crop_box", "crop_mask")
    assert torch.equal(box_to_mask(boxes_B4, GRID), outside_BHW.flatten(1) == 0)


def test_their_rule_reads_the_number_of_the_best_entity():
    """Which is why it ignores confident samples of entity 0, and nothing else: all four combinations occur."""
    found = pem_unit(torch.float64)
    best = inputs("pem_unit_tiny", "similarity")[0].argmax(dim=1)
    assert torch.equal(found["out.ignore"], best == 0)
    assert torch.equal(found["paper.ignore"], found["out.soft_labels"].amax(dim=1) < 0.2)
    assert len(set(zip(found["out.ignore"].tolist(), found["paper.ignore"].tolist(), strict=True))) == 4


def test_with_all_samples_ignored_the_loss_is_zero_where_theirs_is_nan():
    assert meta("pem_unit")["loss_when_all_ignored"] == "nan"
    logits_BM = pem_unit(torch.float64)["out.logits"].clone().requires_grad_()
    loss = pem_loss(logits_BM, pem_unit(torch.float64)["out.soft_labels"], torch.zeros(8, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (logits_BM.grad == 0).all()
