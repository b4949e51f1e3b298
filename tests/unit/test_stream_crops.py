import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.stream.crops import align_boxes, pem_crop_boxes, random_window
from alpro_stream.stream.seeds import Draws, sample_keys, uniform_at

unit = st.floats(0, 1, exclude_max=True)
areas = st.floats(0.3, 0.5)
aspects = st.floats(0.3, 1 / 0.3)
KEYS = sample_keys([(number,) for number in range(2000)], "pem")


def align_box(*draw_and_sizes):
    """One box, None if the frame does not hold it."""
    box, fits = align_boxes(*draw_and_sizes)
    return tuple(box.tolist()) if fits else None


@given(stored=st.integers(1, 512), scale=st.floats(0.001, 1), seed=st.integers(0, 10_000))
def test_windows_are_whole_pixels_inside_the_frame(stored, scale, seed):
    left, top, width, height = (edge * stored for edge in random_window(stored, scale, Draws(seed)))
    assert width == height == pytest.approx(max(1, round(stored * scale)))
    for edge in (left, top):
        assert edge == pytest.approx(round(edge))
        assert 0 <= round(edge) <= stored - round(width)


def test_every_place_of_the_window_is_equally_likely():
    places = np.array([random_window(10, 0.8, Draws("w", number))[:2] for number in range(9000)])
    columns, rows = np.rint(places * 10).astype(int).T
    counts = np.bincount(3 * rows + columns, minlength=9)
    assert len(counts) == 9
    # Standard deviation of a count: 30.
    assert np.abs(counts - 1000).max() < 5 * 30


def test_the_published_window_is_224_of_256():
    assert random_window(256, 0.875, Draws(0))[2] * 256 == 224


@pytest.mark.parametrize(
    ("area", "aspect", "corner", "box"),
    [
        # Four numbers as the published code draws them, and what it makes of them.
        (0.4503720998764038, 1.3147525787353516, (109, 47), (2, 6, 10, 8)),
        (0.460729718208313, 1.3795257806777954, (103, 48), (3, 6, 11, 8)),
        (0.36844462156295776, 0.49147382378578186, (41, 29), (1, 2, 5, 12)),
        (0.37045779824256897, 2.331087112426758, (102, 16), (1, 6, 13, 5)),
        (0.3097454011440277, 3.1029298305511475, (186, 67), None),
        (0.3966469466686249, 1.9711062908172607, (57, 79), None),
        (0.3966028392314911, 3.2917227745056152, (17, 144), None),
    ],
)
def test_boxes_equal_the_published_ones(area, aspect, corner, box):
    left, top = corner
    assert align_box(area, aspect, left / 224, top / 224, 224, 16) == box


@given(area=areas, aspect=aspects, left=unit, top=unit, grid=st.integers(2, 24))
def test_an_accepted_box_is_whole_patches_inside_and_as_large_as_drawn(area, aspect, left, top, grid):
    patch = 16
    size = grid * patch
    box = align_box(area, aspect, left, top, size, patch)
    exact_height, exact_width = np.sqrt(area * aspect) * grid, np.sqrt(area / aspect) * grid
    row, column = int(top * size // patch), int(left * size // patch)
    fits = row + int(exact_height) <= grid and column + int(exact_width) <= grid
    if box is None:
        near = min(abs(exact - round(exact)) for exact in (exact_height, exact_width)) < 1e-6
        assert not fits or min(exact_height, exact_width) < 1 or near
        return
    assert box[:2] == (row, column)
    assert exact_height - 1 - 1e-6 < box[2] <= exact_height + 1e-6
    assert exact_width - 1 - 1e-6 < box[3] <= exact_width + 1e-6
    assert box[0] + box[2] <= grid
    assert box[1] + box[3] <= grid
    assert min(box[2:]) >= 1


@given(area=areas, aspect=aspects, left=unit, top=unit, times=st.sampled_from([2, 4, 8]))
def test_only_the_number_of_patches_matters(area, aspect, left, top, times):
    assert align_box(area, aspect, left, top, 112, 8) == align_box(area, aspect, left, top, 112 * times, 8 * times)


def test_crop_boxes_have_the_published_distribution():
    boxes = pem_crop_boxes(224, 16, KEYS)
    assert boxes.dtype == np.int64
    top, left, height, width = boxes.T
    assert boxes.min() >= 0
    assert (top + height).max() == 14
    assert (left + width).max() == 14
    # Quantiles of the published sampler: 5, 50 and 95 %, after rounding down to patches.
    share, aspect = height * width / 14**2, height / width
    assert np.abs(np.quantile(share, [0.05, 0.5, 0.95]) - [0.2551, 0.3265, 0.4286]).max() < 0.02
    assert np.abs(np.quantile(aspect, [0.05, 0.5, 0.95]) - [0.5, 1.4286, 3.0]).max() < 0.15
    assert share.max() <= 0.5
    assert aspect.min() > 0.2
    assert aspect.max() <= 5


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_tiny_grids_still_get_a_box(grid):
    for top, left, height, width in pem_crop_boxes(16 * grid, 16, KEYS[:20]):
        assert min(height, width) >= 1
        assert max(top + height, left + width) <= grid


def test_a_frame_of_one_patch_is_the_box():
    assert pem_crop_boxes(16, 16, KEYS[:2]).tolist() == [[0, 0, 1, 1]] * 2


def test_a_box_is_the_first_that_fits_whatever_the_companions():
    boxes = pem_crop_boxes(224, 16, KEYS)
    latest = 0
    for row, numbers in enumerate(uniform_at(KEYS, 4 * 100).reshape(-1, 100, 4)):
        area, aspect, left, top = numbers.T
        tries, fits = align_boxes(0.3 + 0.2 * area, 0.3 + (1 / 0.3 - 0.3) * aspect, left, top, 224, 16)
        first = fits.argmax()
        assert fits[first]
        assert boxes[row].tolist() == tries[:, first].tolist()
        latest = max(latest, first)
    # Some rows need more tries than are worked out at once.
    assert latest >= 32
    assert np.array_equal(pem_crop_boxes(224, 16, KEYS[7:9]), boxes[7:9])
    assert pem_crop_boxes(224, 16, KEYS[:0]).shape == (0, 4)
