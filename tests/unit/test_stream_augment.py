"""Which augmentations a clip gets, and that its frames get the same. Their pixels: numerics/test_parity_augment.py."""

from collections import Counter

import pytest
import torch

from alpro_stream.stream.augment import RECIPES, argument_of, augment, draw_operations
from alpro_stream.stream.seeds import Draws

NUM_DRAWS = 4000
STRONG = 7
OPERATIONS = RECIPES["video"].operations
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


@pytest.fixture(scope="module")
def clip_THWC():
    return torch.randint(0, 256, (3, 17, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def drawn():
    return {
        kind: [draw_operations(recipe, Draws("augment", kind, number)) for number in range(NUM_DRAWS)]
        for kind, recipe in RECIPES.items()
    }


def applied(operation, level=STRONG):
    return operation, argument_of(operation, level)


def test_a_video_gets_two_different_operations_all_equally_often(drawn):
    assert all(len({operation for operation, _ in one}) == len(one) == 2 for one in drawn["video"])
    pairs = Counter(tuple(operation for operation, _ in one) for one in drawn["video"])
    assert len(pairs) == 90
    # Of 4000 draws of 90 ordered pairs; standard deviation 7.
    assert max(abs(count - NUM_DRAWS / 90) for count in pairs.values()) < 5 * 7


def test_an_image_gets_each_of_two_with_probability_one_half_and_may_get_one_twice(drawn):
    counts = Counter(len(one) for one in drawn["image"])
    # Standard deviation: 0.008 at most.
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert counts[number] / NUM_DRAWS == pytest.approx(share, abs=0.04)
    pairs = [one for one in drawn["image"] if len(one) == 2]
    assert sum(first == second for first, second in pairs) / len(pairs) == pytest.approx(1 / 8, abs=0.05)
    operations = Counter(operation for one in drawn["image"] for operation, _ in one)
    assert set(operations) == set(RECIPES["image"].operations)
    # Standard deviation: 21.
    assert max(abs(count - NUM_DRAWS / 8) for count in operations.values()) < 5 * 21


@pytest.mark.parametrize("kind", RECIPES)
def test_arguments_are_those_of_the_magnitude(drawn, kind):
    expected = {(operation, argument_of(operation, RECIPES[kind].magnitude)) for operation in RECIPES[kind].operations}
    assert {pair for one in drawn[kind] for pair in one} == expected


@pytest.mark.parametrize("kind", RECIPES)
def test_the_choice_belongs_to_its_draws(drawn, kind):
    again = [draw_operations(RECIPES[kind], Draws("augment", kind, number)) for number in range(50)]
    assert again == drawn[kind][:50]
    assert len(set(again)) > 10


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_frame_becomes_what_it_would_alone_and_the_input_stays(clip_THWC, operation):
    before = clip_THWC.clone()
    found = augment(clip_THWC, [applied(operation)])
    alone = torch.cat([augment(frame_HWC[None], [applied(operation)]) for frame_HWC in clip_THWC])
    assert torch.equal(found, alone)
    assert torch.equal(clip_THWC, before)
    assert (found.shape, found.dtype, found.is_contiguous()) == (clip_THWC.shape, torch.uint8, True)
    assert torch.equal(found, clip_THWC) == (operation == "identity")


def test_operations_follow_one_another(clip_THWC):
    flip, shift = applied("flip"), applied("translate_x")
    both = augment(clip_THWC, [flip, shift])
    assert torch.equal(both, augment(augment(clip_THWC, [flip]), [shift]))
    assert not torch.equal(both, augment(clip_THWC, [shift, flip]))


def test_neutral_operations_give_the_input_itself(clip_THWC):
    at_5 = [(operation, argument_of(operation, 5)) for operation in ("contrast", "brightness", "sharpness")]
    neutral = [("identity", 0.0), *at_5, *((operation, 0.0) for operation in WARPS)]
    assert augment(clip_THWC, neutral) is clip_THWC
    assert augment(clip_THWC, []) is clip_THWC
    assert not torch.equal(augment(clip_THWC, [("flip", 0.0)]), clip_THWC)


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
    frame_THWC = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    frame_THWC[0, 4, 4] = 255
    found_HW = augment(frame_THWC, [(operation, argument)])[0, ..., 1]
    assert (found_HW == 255).nonzero().tolist() == [list(place)]


@pytest.mark.parametrize("operation", WARPS)
def test_outside_is_grey_and_no_edge_is_darker(operation):
    white = torch.full((1, 20, 20, 3), 255, dtype=torch.uint8)
    found = augment(white, [applied(operation)])
    assert (found.min(), found.max()) == (128, 255)
    grey = torch.full((1, 20, 20, 3), 128, dtype=torch.uint8)
    assert torch.equal(augment(grey, [applied(operation)]), grey)
