"""The video encoder against the reference, and checkpoints of another size.

Legend: B clips, T frames, P patches, D width.
"""

from functools import cache

import numpy as np
import pytest
import torch
from parity import recipe
from parity_files import arrays, assert_close, meta
from reference_models import (
    CONFIG,
    PATCH,
    SIZES,
    TOLERANCES,
    assert_parity,
    each_dtype,
    each_output,
    model_from,
    outputs_of,
    pixels,
    reference_file,
    reference_model,
    reference_tensors,
)
from torch.nn.functional import interpolate

SETTINGS = meta("resize")
SAME_GRID = [name for name, one in SETTINGS.items() if one["checkpoint"]["image"] == one["model"]["image"]]
OTHER_GRID = [name for name in SETTINGS if name not in SAME_GRID]
POSITIONS = "visual_encoder.model.pos_embed"


def in_their_order(tokens):
    """Our patches and CLS as one sequence: CLS first, then patch by patch the frames of each."""
    patches_BTPD, cls_B1D = tokens
    return torch.cat([cls_B1D, patches_BTPD.transpose(1, 2).flatten(1, 2)], dim=1)


@cache
@torch.no_grad()
def vision(dtype):
    dual = reference_model("prompter", dtype)
    encoder, video_BTCHW = dual.video_encoder, pixels("vision", dtype)
    with outputs_of({f"out.block{i}": block for i, block in enumerate(encoder.blocks)}) as blocks:
        pooled_BND, feature_BE = dual.encode_video(video_BTCHW)
    found = {name: in_their_order(tokens) for name, tokens in blocks.items()}
    return found | {
        "out.tokens0": in_their_order(encoder.embed(video_BTCHW)),
        "out.norm": encoder.norm(found["out.block2"]),
        "out.pooled": pooled_BND,
        "out.video_feat": feature_BE,
    }


@each_dtype
@each_output("vision_tiny")
def test_vision(dtype, output):
    assert_parity(vision(dtype), "vision_tiny", output, dtype)


@each_dtype
def test_the_shorter_way_to_cls_gives_theirs(dtype):
    dual, video_BTCHW = reference_model("prompter", dtype), pixels("vision", dtype)
    with torch.no_grad():
        cls_BD, feature_BE = dual.video_encoder.forward_cls(video_BTCHW), dual.video_feature(video_BTCHW)
    assert_close(cls_BD, arrays("vision_tiny")["out.pooled"][:, 0], TOLERANCES[dtype])
    assert_close(feature_BE, arrays("vision_tiny")["out.video_feat"], TOLERANCES[dtype])


def test_frames_have_an_order():
    """Else the vectors could not tell the axes of time and space apart."""
    reversed_frames = pixels("vision", torch.float32).flip(1)
    with torch.no_grad():
        feature_BE = reference_model("prompter", torch.float32).video_feature(reversed_frames)
    assert (feature_BE - vision(torch.float32)["out.video_feat"]).abs().max() > 0.01


def resized_model(name, dtype, positions=None):
    """A checkpoint of one size read into a model of another; `positions` takes the place of its own embedding."""
    stored, wanted = SETTINGS[name]["checkpoint"], SETTINGS[name]["model"]
    grid = stored["image"] // PATCH
    shapes = {"pos_embed": (1, 1 + grid**2, SIZES["width"]), "time_embed": (1, stored["frames"], SIZES["width"])}
    file = reference_file("retrieval", **shapes)
    if positions is not None:
        file.tensors[POSITIONS] = positions
    sizes = {"image_size": wanted["image"], "num_frames": wanted["frames"]}
    return model_from(file, dtype, CONFIG.model_copy(update={"video": CONFIG.video.model_copy(update=sizes)}))


def resize_pixels(name, dtype):
    wanted = SETTINGS[name]["model"]
    found = recipe.video(SETTINGS[name]["video"], 1, wanted["frames"], wanted["image"])
    assert recipe.checksum(found) == SETTINGS[name]["pixels"]
    return torch.from_numpy(found).to(dtype)


def theirs(name, part):
    return arrays("resize_tiny")[f"out.{name}.{part}"]


@pytest.mark.parametrize("name", SETTINGS)
def test_time_embeddings_are_resized_as_theirs(name):
    time_embed = resized_model(name, torch.float32).dual.video_encoder.time_embed
    assert np.array_equal(time_embed.detach(), theirs(name, "time_embed"))


@each_dtype
@pytest.mark.parametrize("name", SAME_GRID)
def test_with_another_number_of_frames_the_encoder_is_theirs(name, dtype):
    encoder = resized_model(name, dtype).dual.video_encoder
    assert np.array_equal(encoder.pos_embed.detach().float(), theirs(name, "pos_embed"))
    with torch.no_grad():
        assert_close(encoder(resize_pixels(name, dtype)), theirs(name, "pooled"), TOLERANCES[dtype])


@each_dtype
@pytest.mark.parametrize("name", OTHER_GRID)
def test_with_another_grid_only_the_resized_positions_differ(name, dtype):
    """Theirs resizes the row of patches as if it were a line, which mixes up rows and columns."""
    encoder = resized_model(name, dtype, torch.from_numpy(theirs(name, "pos_embed"))).dual.video_encoder
    with torch.no_grad():
        assert_close(encoder(resize_pixels(name, dtype)), theirs(name, "pooled"), TOLERANCES[dtype])
        ours = resized_model(name, dtype).dual.video_encoder(resize_pixels(name, dtype))
    assert (ours - theirs(name, "pooled")).abs().max() > 0.1


def own_positions():
    return reference_tensors("retrieval")[POSITIONS]


@pytest.mark.parametrize("name", OTHER_GRID)
def test_their_positions_are_nearest_along_the_flattened_grid(name):
    cls_11D, patches_1PD = own_positions()[:, :1], own_positions()[:, 1:]
    size = theirs(name, "pos_embed").shape[1] - 1
    index = torch.arange(size) * patches_1PD.shape[1] // size
    assert np.array_equal(torch.cat([cls_11D, patches_1PD[:, index]], dim=1), theirs(name, "pos_embed"))


@pytest.mark.parametrize("name", OTHER_GRID)
def test_our_positions_are_bicubic_in_two_dimensions(name):
    found = resized_model(name, torch.float32).dual.video_encoder.pos_embed.detach()
    assert torch.equal(found[:, :1], own_positions()[:, :1])
    assert_close(found[:, 1:], in_two_dimensions(name, mode="bicubic", antialias=True), 1e-6)


@each_dtype
@pytest.mark.parametrize("name", SETTINGS)
def test_their_resizing_at_run_time_is_nearest_in_two_dimensions(name, dtype):
    """Only their inner transformer does it, and only it is two-dimensional; stored is every fifth token."""
    positions = torch.cat([own_positions()[:, :1], in_two_dimensions(name, mode="nearest")], dim=1)
    encoder = resized_model(name, dtype, positions).dual.video_encoder
    with torch.no_grad(), outputs_of({"last": encoder.blocks[-1]}) as found:
        encoder(resize_pixels(name, dtype))
    normed = encoder.norm(in_their_order(found["last"]))[:, ::5]
    assert_close(normed, theirs(name, "run_time_norm"), TOLERANCES[dtype])


def in_two_dimensions(name, **how):
    """The recipe's positions on the grid of a setting, without CLS, (1, P, D)."""
    side = SETTINGS[name]["model"]["image"] // PATCH
    grid = own_positions()[:, 1:].unflatten(1, (SIZES["image"] // PATCH, -1)).permute(0, 3, 1, 2)
    return interpolate(grid, size=(side, side), **how).flatten(2).transpose(1, 2)
