"""Which augmentations a clip gets, and what they do to frames. As published: numerics/test_parity_augment.py."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from alpro_stream.stream.augment import GREY, RECIPES, argument_of, augment, draw_operations, mirror, warp_matrix
from alpro_stream.stream.seeds import Draws

NUM_DRAWS = 4000
STRONG = 7
OPERATIONS = RECIPES["video"].operations
FACTORS = ("contrast", "brightness", "sharpness")
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
INTERPOLATED = ("shear_x", "shear_y", "rotate")
# The factors of both rules at the levels of videos and images, and extremes.
FACTOR_VALUES = (0.1, 0.37, 0.55, 1.36, 1.45, 1.63, 1.9)
SHAPES = ((17, 24), (24, 17), (1, 9), (9, 1), (2, 2), (1, 1))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def applied(operation, level=STRONG):
    return operation, argument_of(operation, level)


@pytest.fixture(scope="module")
def drawn():
    return {
        (kind, rule): [draw_operations(kind, rule, Draws("augment", kind, number)) for number in range(NUM_DRAWS)]
        for kind in RECIPES
        for rule in ("published", "increasing")
    }


# Which operations


def test_a_video_gets_two_different_operations_all_equally_often(drawn):
    assert all(len({operation for operation, _ in one}) == len(one) == 2 for one in drawn["video", "published"])
    pairs = Counter(tuple(operation for operation, _ in one) for one in drawn["video", "published"])
    assert len(pairs) == 90
    # Of 4000 draws of 90 ordered pairs; standard deviation 7.
    assert max(abs(count - NUM_DRAWS / 90) for count in pairs.values()) < 5 * 7


def test_an_image_gets_each_of_two_with_probability_one_half_and_may_get_one_twice(drawn):
    counts = Counter(len(one) for one in drawn["image", "published"])
    # Standard deviation: 0.008 at most.
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert counts[number] / NUM_DRAWS == pytest.approx(share, abs=0.04)
    pairs = [one for one in drawn["image", "published"] if len(one) == 2]
    assert sum(first == second for first, second in pairs) / len(pairs) == pytest.approx(1 / 8, abs=0.05)
    operations = Counter(operation for one in drawn["image", "published"] for operation, _ in one)
    assert set(operations) == set(RECIPES["image"].operations)
    # Standard deviation: 21.
    assert max(abs(count - NUM_DRAWS / 8) for count in operations.values()) < 5 * 21


@pytest.mark.parametrize("kind", RECIPES)
def test_published_arguments_are_those_of_the_magnitude(drawn, kind):
    expected = {(operation, argument_of(operation, RECIPES[kind].magnitude)) for operation in RECIPES[kind].operations}
    assert {pair for one in drawn[kind, "published"] for pair in one} == expected


@pytest.mark.parametrize(("kind", "change"), [("video", 0.45), ("image", 0.63)])
def test_increasing_changes_only_the_factors_up_or_down_with_equal_chance(drawn, kind, change):
    ups = []
    for one, published in zip(drawn[kind, "increasing"], drawn[kind, "published"], strict=True):
        assert [operation for operation, _ in one] == [operation for operation, _ in published]
        for (operation, argument), pair in zip(one, published, strict=True):
            if operation not in FACTORS:
                assert (operation, argument) == pair
                continue
            assert abs(argument - 1) == pytest.approx(change)
            ups.append((operation, argument > 1))
    for operation in set(RECIPES[kind].operations) & set(FACTORS):
        share = np.mean([up for which, up in ups if which == operation])
        # Of 800 for a video, 500 for an image: standard deviation 0.022.
        assert share == pytest.approx(0.5, abs=0.1)


def test_signs_do_not_follow_the_choice(drawn):
    """Both operations of a video: their signs are equal half of the time."""
    pairs = [one for one in drawn["video", "increasing"] if all(operation in FACTORS for operation, _ in one)]
    # 267 are expected: standard deviation 0.03.
    assert len(pairs) > 200
    assert np.mean([(a > 1) == (b > 1) for (_, a), (_, b) in pairs]) == pytest.approx(0.5, abs=0.13)


def test_increasing_changes_nothing_at_level_0_and_stays_above_nothing_at_10():
    assert [argument_of("contrast", 0, "increasing", up) for up in (True, False)] == [1, 1]
    assert [argument_of("contrast", 10, "increasing", up) for up in (True, False)] == pytest.approx([1.9, 0.1])


@pytest.mark.parametrize("kind", RECIPES)
def test_none_draws_nothing(kind):
    assert all(draw_operations(kind, "none", Draws(number)) == () for number in range(20))


@pytest.mark.parametrize("rule", ["published", "increasing"])
@pytest.mark.parametrize("kind", RECIPES)
def test_the_choice_belongs_to_its_draws(drawn, kind, rule):
    again = [draw_operations(kind, rule, Draws("augment", kind, number)) for number in range(50)]
    assert again == drawn[kind, rule][:50]
    assert len(set(again)) > 10


# What they do


def origin(operation, argument, x, y, height, width):
    """Where the pixel (x, y) of the result is seen in the frame, in words of the operation; corner pixel (0, 0)."""
    match operation:
        case "shear_x":
            return x - argument * y, y
        case "shear_y":
            return x, y - argument * x
        case "translate_x":
            return x + argument, y
        case "translate_y":
            return x, y + argument
        case "flip":
            return width - 1 - x, y
    # Against the clock as seen, rows downwards: the result's pixel at an angle was 15 degrees, say, with the clock.
    angle, dx, dy = math.radians(argument), x - width / 2, y - height / 2
    return (
        width / 2 + math.cos(angle) * dx - math.sin(angle) * dy,
        height / 2 + math.sin(angle) * dx + math.cos(angle) * dy,
    )


def sample(frame, x, y):
    """Bilinear, grey outside."""
    left, top = math.floor(x), math.floor(y)
    total = np.zeros(3)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = 0 <= row < frame.shape[0] and 0 <= column < frame.shape[1]
        share = (1 - abs(x - column)) * (1 - abs(y - row))
        total += share * (frame[row, column] if inside else GREY)
    return total


def slow_warp(frame, operation, argument, stepped):
    """Pixel by pixel, bilinear; at exact positions or, as OpenCV does, at positions in steps of 1/32 of a pixel."""
    height, width, _ = frame.shape

    def position(x, y):
        if not stepped:
            return origin(operation, argument, x, y, height, width)
        corner, along, down = (origin(operation, argument, *at, height, width) for at in ((0, 0), (x, 0), (0, y)))
        # Two parts in 1/1024 of a pixel, of the column and of the row, and their sum rounded.
        return (
            (round(1024 * (a - c)) + round(1024 * b) + 16) // 32 / 32
            for c, a, b in zip(corner, along, down, strict=True)
        )

    return np.array([[sample(frame, *position(x, y)) for x in range(width)] for y in range(height)])


def slow_factor(frame, operation, factor):
    """Before rounding down: distances from black, from the mean grey, or from the blurred frame, times the factor."""
    pixels = frame.astype(float)
    height, width, _ = frame.shape
    if operation == "brightness":
        return pixels * factor
    if operation == "contrast":
        grey = np.mean([0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in pixels.reshape(-1, 3)])
        return grey + factor * (pixels - grey)
    result = pixels.copy()
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            around = pixels[y - 1 : y + 2, x - 1 : x + 2].sum(axis=(0, 1))
            blurred = np.rint((around + 4 * pixels[y, x]) / 13)
            result[y, x] = blurred + round(factor * 4096) / 4096 * (pixels[y, x] - blurred)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", FACTOR_VALUES)
@pytest.mark.parametrize("operation", FACTORS)
def test_factors_against_a_plain_reference(operation, factor, shape):
    frame = noise(*shape)
    expected = np.floor(slow_factor(frame, operation, factor).clip(0, 255))
    assert np.array_equal(augment(frame, [(operation, factor)]), expected)


@pytest.mark.parametrize("factor", FACTOR_VALUES)
def test_sharpness_is_exact_for_every_pair_of_levels(factor):
    """One dot on every background: all differences that can be, so also those where a float would round either way."""
    dots = np.arange(256, dtype=np.uint8)
    frame = np.repeat(dots[:, None, None], 3, axis=2).repeat(768, axis=1).repeat(3, axis=0)
    frame[1::3, 1::3] = dots[None, :, None]
    expected = np.empty((256, 256))
    blurred = np.rint((8 * dots[:, None].astype(float) + 5 * dots[None].astype(float)) / 13)
    expected = blurred + round(factor * 4096) / 4096 * (dots[None].astype(float) - blurred)
    found = augment(frame, [("sharpness", factor)])[1::3, 1::3, 1]
    assert np.array_equal(found, np.floor(expected.clip(0, 255)))


@pytest.mark.parametrize("level", [5, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", WARPS)
def test_warps_against_a_plain_reference(operation, shape, level):
    frame, argument = noise(*shape), argument_of(operation, level)
    found = augment(frame, [(operation, argument)]).astype(float)
    assert np.array_equal(found, np.floor(slow_warp(frame, operation, argument, stepped=True) + 0.5))
    # The steps change noise by this at most: 1/64 and 1/1024 of a pixel in both directions, 255 levels a pixel.
    most = 2 * 255 * (1 / 64 + 1 / 1024) + 0.5
    assert np.abs(found - slow_warp(frame, operation, argument, stepped=False)).max() <= most


def test_a_flip_against_a_plain_reference():
    frame = noise(9, 14)
    assert np.array_equal(augment(frame, [("flip", 0.0)]), slow_warp(frame, "flip", 0.0, stepped=False))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_matrix_says_where_pixels_come_from(operation):
    height, width = 14, 21
    matrix = warp_matrix(operation, argument_of(operation, STRONG), height, width)
    if operation in ("identity", *FACTORS):
        assert matrix is None
        return
    for x, y in ((0, 0), (3, 12), (20, 13), (10.5, 7)):
        expected = origin(operation, argument_of(operation, STRONG), x, y, height, width)
        assert matrix @ (x, y, 1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("operation", "argument", "place"),
    [
        ("translate_x", 2.0, (4, 2)),
        ("translate_y", 2.0, (2, 4)),
        ("shear_x", 0.5, (4, 6)),
        ("shear_y", 0.5, (6, 4)),
        # About the corner between four pixels that is half a pixel right of and below the centre, at (4.5, 4.5).
        ("rotate", 90.0, (5, 4)),
        ("flip", 0.0, (4, 4)),
    ],
)
def test_where_a_dot_goes(operation, argument, place):
    frame = np.zeros((9, 9, 3), dtype=np.uint8)
    frame[4, 4] = 255
    found = augment(frame, [(operation, argument)])[..., 1]
    assert np.argwhere(found == 255).tolist() == [list(place)]


@pytest.mark.parametrize("operation", WARPS)
def test_outside_is_grey_and_no_edge_is_darker(operation):
    found = augment(np.full((20, 20, 3), 255, dtype=np.uint8), [applied(operation)])
    assert (found.min(), found.max()) == (128, 255)
    grey = np.full((20, 20, 3), 128, dtype=np.uint8)
    assert np.array_equal(augment(grey, [applied(operation)]), grey)


@pytest.mark.parametrize("operation", ["translate_x", "translate_y"])
def test_a_shift_beyond_the_frame_leaves_grey(operation):
    assert (augment(noise(4, 4), [(operation, 7.0)]) == GREY).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_input_stays_and_a_part_of_a_frame_is_taken_as_a_frame_of_its_own(operation):
    frame = noise(30, 40)
    before, part = frame.copy(), frame[5:22, 7:31]
    found = augment(part, [applied(operation)])
    assert np.array_equal(found, augment(np.ascontiguousarray(part), [applied(operation)]))
    assert np.array_equal(frame, before)
    assert (found.shape, found.dtype) == (part.shape, np.uint8)
    assert np.array_equal(found, part) == (operation == "identity")


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation != "contrast"])
def test_all_frames_of_a_clip_are_changed_alike(operation):
    """What another frame shows changes nothing: with red and blue exchanged, they are exchanged in the result.

    But for contrast, whose grey is the mean of its own frame, as published.
    """
    clip = [noise(17, 24, seed) for seed in range(3)]
    swapped = [augment(np.ascontiguousarray(frame[..., ::-1]), [applied(operation)]) for frame in clip]
    for frame, other in zip(clip, swapped, strict=True):
        assert np.array_equal(augment(frame, [applied(operation)])[..., ::-1], other)


def test_operations_follow_one_another():
    frame, flip, shift = noise(17, 24), applied("flip"), applied("translate_x")
    both = augment(frame, [flip, shift])
    assert np.array_equal(both, augment(augment(frame, [flip]), [shift]))
    assert not np.array_equal(both, augment(frame, [shift, flip]))


def test_neutral_operations_give_the_frame_itself():
    frame = noise(17, 24)
    assert augment(frame, [("identity", 0.0), *(applied(operation, 5) for operation in FACTORS)]) is frame
    assert augment(frame, []) is frame


def test_pixels_do_not_depend_on_threads():
    """Of a size that OpenCV would split over threads of its own; many at once are those of one after the other."""
    frames = [noise(400, 500, seed) for seed in range(3)]
    jobs = [(frame, [applied(operation)]) for operation in OPERATIONS for frame in frames]
    alone = [augment(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: augment(*job), jobs))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    ours = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        split = [augment(*job) for job in jobs]
    finally:
        cv2.setNumThreads(0)
    assert all(np.array_equal(a, b) for a, b in zip(alone, split, strict=True))
    assert ours == 1  # no threads beside those that call it


@pytest.mark.parametrize("shape", SHAPES)
def test_mirror_writes_where_it_is_told(shape):
    frame = noise(shape[0] + 4, shape[1] + 6)[2:-2, 3:-3]
    clip = np.zeros((3, *shape, 3), dtype=np.uint8)
    out = mirror(frame, clip[1])
    assert np.shares_memory(out, clip)
    assert np.array_equal(clip[1], frame[:, ::-1])
    assert not clip[[0, 2]].any()
