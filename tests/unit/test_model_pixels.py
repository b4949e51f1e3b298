import pytest
import torch

from alpro_stream.model.pixels import PIXEL_MEAN, PIXEL_STD, crop_outside_black, inside_box, normalise


@pytest.fixture
def frames_BTHWC():
    return torch.randint(1, 256, (2, 3, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalise_equals_a_loop_over_colours(frames_BTHWC):
    video_BTCHW = normalise(frames_BTHWC)
    assert video_BTCHW.shape == (2, 3, 3, 32, 48)
    assert video_BTCHW.is_contiguous()
    for colour in range(3):
        expected = (frames_BTHWC[..., colour].double() / 255 - PIXEL_MEAN[colour]) / PIXEL_STD[colour]
        torch.testing.assert_close(video_BTCHW[:, :, colour].double(), expected, rtol=1e-5, atol=1e-6)


def test_normalise_rounds_once_to_bfloat16(frames_BTHWC):
    rounded = normalise(frames_BTHWC, torch.bfloat16)
    assert torch.equal(rounded, normalise(frames_BTHWC).bfloat16())


def test_outside_of_the_box_is_black_before_normalisation(frames_BTHWC):
    before = frames_BTHWC.clone()
    boxes_B4 = torch.tensor([[0, 1, 1, 2], [1, 0, 1, 1]])  # top, left, height, width in patches of 16
    cropped = crop_outside_black(frames_BTHWC, boxes_B4, 16)
    for clip, (top, left, height, width) in enumerate((boxes_B4 * 16).tolist()):
        for row in range(32):
            for column in range(48):
                inside = top <= row < top + height and left <= column < left + width
                expected = frames_BTHWC[clip, :, row, column] if inside else torch.zeros(3, 3, dtype=torch.uint8)
                assert torch.equal(cropped[clip, :, row, column], expected)
    assert torch.equal(frames_BTHWC, before)
    black = normalise(cropped)[0, 0, :, 31, 0]
    torch.testing.assert_close(black, -torch.tensor(PIXEL_MEAN) / torch.tensor(PIXEL_STD))


@pytest.mark.parametrize(("box", "cells"), [([0, 0, 2, 3], 6), ([1, 2, 1, 1], 1), ([0, 0, 0, 0], 0), ([1, 2, 9, 9], 1)])
def test_inside_box_counts(box, cells):
    assert inside_box(torch.tensor([box]), 2, 3).sum() == cells
