"""The text encoder, the multimodal encoder and its heads against the reference."""

from functools import cache

import pytest
import torch
from parity_files import arrays, assert_close
from reference_models import (
    LENGTH,
    SIZES,
    TOLERANCES,
    assert_parity,
    each_dtype,
    each_output,
    inputs,
    outputs_of,
    pixels,
    reference_model,
)

CHECKED_COUNTS = (1, 2, LENGTH, LENGTH + 1, LENGTH + 26)


@cache
@torch.no_grad()
def text(dtype):
    model = reference_model("pretrain", dtype)
    encoder, multimodal = model.dual.text_encoder, model.multimodal
    ids_BL, mask_BL = inputs("text_tiny", "ids", "mask")
    layers = {f"out.layer{i}": layer for i, layer in enumerate([*encoder.layers, *multimodal.layers])}
    with outputs_of({"out.embeddings": encoder.embeddings} | layers) as found:
        text_BLD, feature_BE = model.dual.encode_text(ids_BL, mask_BL)
        video_BND, _ = model.dual.encode_video(pixels("vision", dtype))
        fused_BSD = multimodal(text_BLD, mask_BL, video_BND)
    return found | {
        "out.text": text_BLD,
        "out.text_feat": feature_BE,
        "out.fusion": fused_BSD,
        "out.mlm_logits": model.word_logits(fused_BSD[:, :LENGTH]),
        "out.itm_logits": model.match_logits(fused_BSD[:, 0]),
        "out.all_layers_text_only": multimodal(text_BLD, mask_BL, video_BND[:, :0]),
    }


@each_dtype
@each_output("text_tiny")
def test_text(dtype, output):
    assert_parity(text(dtype), "text_tiny", output, dtype)


@each_dtype
@pytest.mark.parametrize("count", CHECKED_COUNTS)
def test_the_first_tokens_alone_are_theirs(dtype, count):
    """The last layer then computes nothing else (`num_tokens`)."""
    model, mask_BL = reference_model("pretrain", dtype), inputs("text_tiny", "mask")[0]
    with torch.no_grad():
        video_BND, _ = model.dual.encode_video(pixels("vision", dtype))
        found = model.multimodal(text(dtype)["out.text"], mask_BL, video_BND, num_tokens=count)
    assert_close(found, arrays("text_tiny")["out.fusion"][:, :count], TOLERANCES[dtype])


def test_pairs_are_finished_each_in_its_own_way():
    """As the objective does: all layers but the last over all pairs, then rows with different numbers of tokens."""
    model, mask_BL = reference_model("pretrain", torch.float32), inputs("text_tiny", "mask")[0]
    with torch.no_grad():
        video_BND, _ = model.dual.encode_video(pixels("vision", torch.float32))
        fusing = model.multimodal.begin(text(torch.float32)["out.text"], mask_BL, video_BND)
        whole, first = model.multimodal.finish(fusing[:2]), model.multimodal.finish(fusing[2:], 1)
    assert_close(whole, arrays("text_tiny")["out.fusion"][:2])
    assert_close(first, arrays("text_tiny")["out.fusion"][2:, :1])


def test_padding_changes_no_token():
    """Whatever stands in it: so theirs, which has a fixed row for padding, and ours, which has none, cannot differ."""
    model, (ids_BL, mask_BL) = reference_model("pretrain", torch.float64), inputs("text_tiny", "ids", "mask")
    assert (mask_BL == 0).sum() >= 10
    other_ids = torch.where(mask_BL == 1, ids_BL, torch.full_like(ids_BL, SIZES["vocab"] - 1))
    with torch.no_grad():
        video_BND, _ = model.dual.encode_video(pixels("vision", torch.float64))
        text_BLD, feature_BE = model.dual.encode_text(other_ids, mask_BL)
        fused_BSD = model.multimodal(text_BLD, mask_BL, video_BND)
    tokens = mask_BL.bool()
    expected = text(torch.float64)
    assert torch.equal(text_BLD[tokens], expected["out.text"][tokens])
    assert not torch.equal(text_BLD[~tokens], expected["out.text"][~tokens])
    assert torch.equal(feature_BE, expected["out.text_feat"])
    assert torch.equal(fused_BSD[:, :LENGTH][tokens], expected["out.fusion"][:, :LENGTH][tokens])
    assert torch.equal(fused_BSD[:, LENGTH:], expected["out.fusion"][:, LENGTH:])
