"""The augmentations against pictures that the reference made with OpenCV."""

import math

import numpy as np
import pytest
import torch
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
EXACT = ("identity", "brightness", "translate_x", "translate_y", "flip")
WARPED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
LEVELS = (5, 7)
GREY = 128


def picture():
    return arrays("augment")["in.picture"]


def reference(operation, level):
    return arrays("augment")[f"out.{NAMES[operation]}.{level}"].astype(int)


def ours(operation, level):
    applied = [(operation, argument_of(operation, level))]
    return augment(torch.from_numpy(picture())[None], applied)[0].numpy().astype(int)


def matrix(operation, argument):
    """The published affine maps, from a pixel (column, row) to where it goes; the pixel at the corner is (0, 0)."""
    height, width, _ = picture().shape
    if operation == "rotate":
        cos, sin = math.cos(math.radians(argument)), math.sin(math.radians(argument))
        x, y = width / 2, height / 2
        return np.array([[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]])
    slope_or_pixels = {
        "shear_x": [[1, argument, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [argument, 1, 0]],
        "translate_x": [[1, 0, -argument], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, -argument]],
    }
    # The reference keeps these in float32.
    return np.array(slope_or_pixels[operation], dtype=np.float32).astype(float)


def slow_warp(operation, level, fractions):
    """Bilinear with grey outside, value by value; positions rounded to 1 / `fractions` of a pixel, None: exact."""
    height, width, _ = picture().shape
    back = np.linalg.inv(np.vstack([matrix(operation, argument_of(operation, level)), [0, 0, 1]]))[:2]
    rows, columns = np.mgrid[:height, :width]
    if fractions is None:
        x, y = (line[0] * columns + line[1] * rows + line[2] for line in back)
    else:
        # OpenCV adds up in 1/1024 of a pixel and rounds the sum.
        x, y = (
            (np.rint(1024 * line[0] * columns) + np.rint(1024 * (line[1] * rows + line[2])) + 512 / fractions)
            // (1024 / fractions)
            / fractions
            for line in back
        )
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_share, lower_share = (x - left)[..., None], (y - top)[..., None]
    padded = np.full((height + 2, width + 2, 3), float(GREY))
    padded[1:-1, 1:-1] = picture()

    def at(rows, columns):
        return padded[(rows + 1).clip(0, height + 1), (columns + 1).clip(0, width + 1)]

    upper = (1 - right_share) * at(top, left) + right_share * at(top, left + 1)
    lower = (1 - right_share) * at(top + 1, left) + right_share * at(top + 1, left + 1)
    return (1 - lower_share) * upper + lower_share * lower


def slow_factor(operation, factor):
    """The published formulas of contrast and sharpness, before their values become bytes."""
    pixels = picture().astype(float)
    if operation == "contrast":
        # The weights are those of blue, green, red; the picture is red, green, blue.
        mean = (pixels.mean(axis=(0, 1)) * [0.114, 0.587, 0.299]).sum()
        return (pixels - mean) * factor + mean
    pixels = pixels.astype(np.float32)  # as theirs: a product may lie on either side of an integer
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
def test_without_interpolation_every_pixel_is_equal(operation, level):
    assert np.array_equal(ours(operation, level), reference(operation, level))


@pytest.mark.parametrize("operation", ["contrast", "brightness", "sharpness"])
def test_factors_at_the_level_of_videos_change_nothing(operation):
    assert argument_of(operation, RECIPES["video"].magnitude) == 1.0
    for found in (ours(operation, 5), reference(operation, 5)):
        assert np.array_equal(found, picture())


def test_contrast_is_within_one_level():
    assert np.array_equal(slow_factor("contrast", 1.36).clip(0, 255).astype(int), reference("contrast", 7))
    assert np.abs(ours("contrast", 7) - reference("contrast", 7)).max() == 1


def test_sharpness_is_within_one_level_but_where_theirs_wraps_around():
    """Beyond 0 and 255 their bytes start again at the other end, so white dots get black; ours are clamped."""
    exact, theirs = slow_factor("sharpness", 1.36), reference("sharpness", 7)
    wrapped = (np.trunc(exact) < 0) | (np.trunc(exact) > 255)
    assert wrapped.mean() == pytest.approx(0.16, abs=0.01)
    assert np.array_equal(np.trunc(exact).astype(int) % 256, theirs)
    found = ours("sharpness", 7)
    assert np.abs(found - theirs)[~wrapped].max() <= 1
    assert np.array_equal(found[wrapped], np.where(exact > 128, 255, 0)[wrapped])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operation", WARPED)
def test_the_affine_maps_are_the_published_ones(operation, level):
    """Their pictures follow to the last pixel from these matrices and from OpenCV's steps of 1/32 of a pixel."""
    theirs = np.floor(slow_warp(operation, level, 32) + 0.5)
    assert np.array_equal(theirs, reference(operation, level))
    # Ours from the same matrices without those steps; half a level is the rounding to bytes.
    assert np.abs(ours(operation, level) - slow_warp(operation, level, None)).max() < 0.501


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operation", ["shear_x", "shear_y", "rotate"])
def test_interpolated_pixels_are_close(operation, level):
    """Of noise, the worst case: neighbours differ by 85 levels on average."""
    difference = np.abs(ours(operation, level) - reference(operation, level))
    assert difference.mean() < 0.8
    assert difference.max() <= 5


@pytest.mark.parametrize("kind", ["video", "image"])
def test_recipes_are_the_published_ones(kind):
    published, recipe = facts()["augmentation"][f"pretrain_{kind}"], RECIPES[kind]
    assert [NAMES[operation] for operation in recipe.operations] == published["operations"]
    assert (recipe.count, recipe.replacement) == (published["count"], published["replacement"])
    assert (recipe.probability, recipe.magnitude) == (published["probability_each"], published["magnitude"])
