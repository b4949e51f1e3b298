"""Masks, crop boxes and frames against the draws and choices of the reference."""

import numpy as np
import pytest
from parity_files import arrays, facts, meta

from alpro_stream.stream.crops import align_boxes, pem_crop_boxes
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.seeds import Draws, sample_keys, uniform_at
from alpro_stream.stream.text import mask_tokens

IMAGE, PATCH = 224, 16
UNIFORM = {
    tuple(map(int, name.split("/")[1:])): indices
    for name, indices in meta("frames")["indices"].items()
    if name.startswith("uniform")
}


def test_masked_tokens_are_those_of_the_same_draws():
    stored, settings = arrays("mlm_masking"), meta("mlm_masking")
    select, to_mask, to_word = stored["in.uniform"].astype(np.float64)
    # Theirs draws three times (chosen? MASK? of the rest half a word); ours once for all that happens to a token.
    fate = np.where(to_mask < 0.8, to_mask, 0.8 + 0.2 * to_word)
    which = (stored["in.random_words"] + 0.5) / settings["vocab"]
    special = np.isin(stored["in.ids"], settings["special_ids"])
    uniform_BL3 = np.stack([select, fate, which], axis=-1)
    found = mask_tokens(stored["in.ids"], special, uniform_BL3, 0.15, settings["mask_id"], settings["vocab"])
    assert np.array_equal(found.ids_BL, stored["out.ids"])
    assert np.array_equal(found.labels_BL, stored["out.labels"])


def test_the_stored_masks_hold_all_three_fates():
    """Else the test above would not show much."""
    stored = arrays("mlm_masking")
    chosen = stored["out.labels"] != -100
    after, before = stored["out.ids"][chosen], stored["in.ids"][chosen]
    masked, kept = after == meta("mlm_masking")["mask_id"], after == before
    assert min(masked.sum(), kept.sum(), (~masked & ~kept).sum()) >= 2


def test_crop_boxes_are_those_of_the_same_draws():
    stored = arrays("crop_sampler")
    rows = zip(*(stored[f"in.{name}"] for name in ("area", "aspect", "corner")), stored["out.box"], strict=True)
    num_accepted = 0
    for area, aspect, (left, top), expected in rows:
        box, fits = align_boxes(float(area), float(aspect), left / IMAGE, top / IMAGE, IMAGE, PATCH)
        assert fits == (expected[0] >= 0)
        if fits:
            assert (PATCH * box).tolist() == expected.tolist()
            num_accepted += 1
    assert num_accepted == stored["out.accepted"].sum() == 40


OWN_KEYS = sample_keys([(number,) for number in range(4000)], "own boxes")


@pytest.fixture(scope="module")
def own_boxes():
    return pem_crop_boxes(IMAGE, PATCH, OWN_KEYS)


def test_as_many_draws_are_accepted_as_published():
    area, aspect, left, top = np.moveaxis(uniform_at(OWN_KEYS, 4 * 8).reshape(-1, 4), 1, 0)
    _, fits = align_boxes(0.3 + 0.2 * area, 0.3 + (1 / 0.3 - 0.3) * aspect, left, top, IMAGE, PATCH)
    # Standard deviation of the share: 0.002. The published figure has three digits.
    assert fits.mean() == pytest.approx(facts()["pem"]["acceptance_share_224"], abs=0.006)


def test_areas_are_distributed_as_published(own_boxes):
    _, _, height, width = own_boxes.T
    share, published = height * width / (IMAGE // PATCH) ** 2, facts()["pem"]["area_share_after_alignment_224"]
    assert share.mean() == pytest.approx(published["mean"], abs=0.003)
    assert (share < 0.3).mean() == pytest.approx(published["share_below_030"], abs=0.025)
    assert_quantiles(share, published, meta("crop_sampler")["area_fraction_after_alignment"])


def test_aspects_are_distributed_as_published(own_boxes):
    _, _, height, width = own_boxes.T
    published = facts()["pem"]["height_over_width_after_alignment_224"]
    assert_quantiles(height / width, published, meta("crop_sampler")["height_over_width_after_alignment"])


def assert_quantiles(values, published, quantiles):
    """Values of whole patches are few: their quantiles are equal, but for the rounding of the published ones."""
    found = [values.min(), np.median(values), values.max()]
    assert found == pytest.approx([published[key] for key in ("min", "median", "max")], abs=6e-4)
    levels = meta("crop_sampler")["quantile_levels"]
    # Without the extremes, which depend on how many were drawn.
    assert np.quantile(values, levels[1:-1]) == pytest.approx(quantiles[1:-1], abs=6e-4)


@pytest.mark.parametrize(("num_frames", "length"), UNIFORM)
def test_uniform_differs_from_theirs_by_their_truncated_step_and_our_middles(num_frames, length):
    theirs = np.array(UNIFORM[num_frames, length])
    frame = np.arange(num_frames)
    assert np.array_equal(theirs, frame * (length // num_frames))
    ours = np.array(choose_frames(length, num_frames, "uniform", Draws("frames")))
    # What the truncation takes from each step, i * (length / frames - int(length / frames)), and half a step.
    lost = 2 * frame * (length % num_frames)
    assert np.array_equal(ours - theirs, (lost + length) // (2 * num_frames))
    if length % num_frames == 0:
        assert set(ours - theirs) == {length // num_frames // 2}


@pytest.mark.parametrize(("num_frames", "length"), UNIFORM)
def test_uniform_takes_a_frame_of_each_part_that_their_even_spread_begins(num_frames, length):
    begins = np.array(meta("frames")["indices"][f"nlvl_uniform/{num_frames}/{length}"])
    ours = np.array(choose_frames(length, num_frames, "uniform", Draws("frames")))
    ends = np.append(begins[1:], length)
    assert (begins <= ours).all()
    assert (ours <= np.maximum(begins, ends)).all()


def test_of_30_frames_theirs_never_shows_the_second_half():
    assert max(UNIFORM[16, 30]) == 15
    assert max(choose_frames(30, 16, "uniform", Draws("frames"))) == 29


@pytest.mark.parametrize(("num_frames", "length"), [case for case in UNIFORM if case[0] <= case[1]])
def test_headtail_draws_half_of_the_frames_from_each_half(num_frames, length):
    """The reference's draws are not stored; facts.json says its rule."""
    for number in range(20):
        chosen = choose_frames(length, num_frames, "headtail", Draws("headtail", number))
        assert chosen == sorted(set(chosen))
        assert len(chosen) == num_frames
        assert sum(frame < length // 2 for frame in chosen) == num_frames // 2
