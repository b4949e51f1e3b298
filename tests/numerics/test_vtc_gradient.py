"""The gradient of VTC against finite differences, in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from alpro_stream.losses.vtc import vtc_loss

STEP = 1e-6


def loss_of(values, *masks):
    """VTC of raw features: all values of both sides and the temperature in one vector."""
    video, text = values[:-1].view(2, 4, 3)
    return vtc_loss(normalize(video, dim=1), normalize(text, dim=1), values[-1], *masks)


@pytest.mark.parametrize("invalid", [[], [1]])
@pytest.mark.parametrize("ignored", [(), ((0, 2), (2, 0), (3, 1))])
def test_gradient_equals_finite_differences(ignored, invalid):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(25, dtype=torch.float64, generator=generator)
    values[-1] = 0.1
    ignore_GG = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ignored:
        ignore_GG[i, j] = True
    valid_G = torch.ones(4, dtype=torch.bool)
    valid_G[invalid] = False
    masks = (ignore_GG, valid_G)
    (exact,) = torch.autograd.grad(loss_of(values.requires_grad_(), *masks), values)
    for index in range(25):
        shift = torch.zeros(25, dtype=torch.float64)
        shift[index] = STEP
        with torch.no_grad():
            slope = (loss_of(values + shift, *masks) - loss_of(values - shift, *masks)) / (2 * STEP)
        torch.testing.assert_close(exact[index], slope, rtol=1e-6, atol=1e-7)
