"""The augmentations against pictures that the reference made with OpenCV."""

import numpy as np
import pytest
from parity_files import arrays, facts, meta

from alpro_stream.stream.augment import RECIPES, argument_of, augment

NAMES = {
    "identity": "Identity",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "flip": "HorizontalFlip",
}
FACTORS = ("contrast", "brightness", "sharpness")
EXACT = tuple(operation for operation in NAMES if operation not in ("contrast", "sharpness"))
LEVELS = (5, 7)
GREY = 128


def picture():
    return arrays("augment")["in.picture"]


def reference(operation, level):
    return arrays("augment")[f"out.{NAMES[operation]}.{level}"].astype(int)


def ours(operation, level):
    return augment(picture(), [(operation, argument_of(operation, level))]).astype(int)


def published_contrast(factor):
    """Before its values become bytes."""
    pixels = picture().astype(float)
    # The weights are those of blue, green, red; the picture is red, green, blue.
    mean = (pixels.mean(axis=(0, 1)) * [0.114, 0.587, 0.299]).sum()
    return (pixels - mean) * factor + mean


def published_sharpness(factor):
    """Before its values become bytes."""
    pixels = picture().astype(np.float32)  # as theirs: a product may lie on either side of an integer
    height, width, _ = pixels.shape
    around = sum(pixels[row : height - 2 + row, column : width - 2 + column] for row in range(3) for column in range(3))
    blurred = np.rint((around + 4 * pixels[1:-1, 1:-1]) / 13)
    sharp = pixels.copy()
    sharp[1:-1, 1:-1] = blurred + factor * (pixels[1:-1, 1:-1] - blurred)
    return sharp


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operation", NAMES)
def test_arguments(operation, level):
    theirs = meta("augment")[f"{NAMES[operation]}.{level}"]["arguments"]
    if not theirs:
        assert argument_of(operation, level) == 0
        return
    assert argument_of(operation, level) == pytest.approx(theirs[0], rel=1e-12)
    assert theirs[1:] in ([], [[GREY] * 3])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operation", EXACT)
def test_every_pixel_is_equal(operation, level):
    """Interpolated ones too: OpenCV's warp, with its steps of 1/32 of a pixel, is the published one."""
    assert np.array_equal(ours(operation, level), reference(operation, level))


@pytest.mark.parametrize("operation", FACTORS)
def test_factors_at_the_level_of_videos_change_nothing(operation):
    assert argument_of(operation, RECIPES["video"].magnitude) == 1.0
    for found in (ours(operation, 5), reference(operation, 5)):
        assert np.array_equal(found, picture())


def test_contrast_is_within_one_level():
    """Theirs weighs red as blue, ours does not."""
    assert np.array_equal(published_contrast(1.36).clip(0, 255).astype(int), reference("contrast", 7))
    assert np.abs(ours("contrast", 7) - reference("contrast", 7)).max() == 1


def test_sharpness_is_within_one_level_but_where_theirs_wraps_around():
    """Beyond 0 and 255 their bytes start again at the other end, so white dots get black; ours are clamped."""
    exact, theirs = published_sharpness(1.36), reference("sharpness", 7)
    wrapped = (np.trunc(exact) < 0) | (np.trunc(exact) > 255)
    assert wrapped.mean() == pytest.approx(0.16, abs=0.01)
    assert np.array_equal(np.trunc(exact).astype(int) % 256, theirs)
    found = ours("sharpness", 7)
    difference = np.abs(found - theirs)[~wrapped]
    assert difference.max() <= 1
    # The factor is rounded to 1/4096: of noise, one pixel in fifty falls to the next level.
    assert difference.mean() < 0.03
    assert np.array_equal(found[wrapped], np.where(exact > 128, 255, 0)[wrapped])


@pytest.mark.parametrize("kind", ["video", "image"])
def test_recipes_are_the_published_ones(kind):
    published, recipe = facts()["augmentation"][f"pretrain_{kind}"], RECIPES[kind]
    assert [NAMES[operation] for operation in recipe.operations] == published["operations"]
    assert (recipe.count, recipe.replacement) == (published["count"], published["replacement"])
    assert (recipe.probability, recipe.magnitude) == (published["probability_each"], published["magnitude"])
