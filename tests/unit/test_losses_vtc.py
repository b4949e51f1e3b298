import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from alpro_stream.losses.vtc import vtc_loss


def slow_vtc(video, text, temperature, ignore):
    """Both directions, one row and one candidate at a time."""
    size = len(video)
    total = 0.0
    for i in range(size):
        for query, candidates, skip in (
            (video[i], text, lambda j, i=i: ignore[i][j]),
            (text[i], video, lambda j, i=i: ignore[j][i]),
        ):
            scores = [math.exp(float(query @ candidates[j]) / temperature) for j in range(size)]
            kept = [score for j, score in enumerate(scores) if j == i or not skip(j)]
            total -= math.log(scores[i] / sum(kept))
    return total / size / 2


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    video, text = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    return normalize(video, dim=1), normalize(text, dim=1)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_equals_the_slow_loss_with_any_ignore_mask(features, share):
    ignore_GG = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < share
    loss = vtc_loss(*features, torch.tensor(0.1, dtype=torch.float64), ignore_GG)
    assert loss.item() == pytest.approx(slow_vtc(*features, 0.1, ignore_GG.tolist()), abs=1e-12)


def test_no_mask_is_an_empty_mask(features):
    temperature = torch.tensor(0.07)
    assert vtc_loss(*features, temperature) == vtc_loss(*features, temperature, torch.zeros(6, 6, dtype=torch.bool))


INVALID = [(2,), (0, 5), (0, 1, 2, 3, 4)]


def valid_but(rows):
    valid_G = torch.ones(6, dtype=torch.bool)
    valid_G[list(rows)] = False
    return valid_G


@pytest.mark.parametrize("rows", INVALID)
def test_an_invalid_sample_is_as_if_it_were_not_there(features, rows):
    temperature = torch.tensor(0.1, dtype=torch.float64)
    ignore_GG = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.3
    valid_G = valid_but(rows)
    whole, less = ([one.clone().requires_grad_() for one in (*features, temperature)] for _ in range(2))
    loss = vtc_loss(*whole, ignore_GG, valid_G)
    expected = vtc_loss(less[0][valid_G], less[1][valid_G], less[2], ignore_GG[valid_G][:, valid_G])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    gradients = torch.autograd.grad(loss, whole), torch.autograd.grad(expected, less)
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    assert all(gradient[~valid_G].eq(0).all() for gradient in gradients[0][:2])


def test_no_valid_sample_is_zero_with_zero_gradients(features):
    whole = [one.clone().requires_grad_() for one in (*features, torch.tensor(0.07))]
    loss = vtc_loss(*whole, torch.eye(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad.eq(0).all() for tensor in whole)


@pytest.mark.parametrize("valid_G", [None, torch.ones(6, dtype=torch.bool)])
def test_with_valid_samples_alone_it_is_the_plain_mean_to_the_last_bit(features, valid_G):
    ours, plain = ([one.float().clone().requires_grad_() for one in (*features, torch.tensor(0.07))] for _ in range(2))
    loss = vtc_loss(*ours, None, valid_G)
    logits_GG = plain[0] @ plain[1].T / plain[2]
    expected = (cross_entropy(logits_GG, torch.arange(6)) + cross_entropy(logits_GG.T, torch.arange(6))) / 2
    assert loss.equal(expected)
    gradients = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, plain)
    assert all(found.equal(right) for found, right in zip(*gradients, strict=True))


def test_an_ignored_pair_gets_no_gradient(features):
    video, text = (feature.clone().requires_grad_() for feature in features)
    ignore_GG = ~torch.eye(6, dtype=torch.bool)
    ignore_GG[0, 1] = False
    vtc_loss(video, text, torch.tensor(0.1), ignore_GG).backward()
    # Only the pair of video 0 and text 1 is left, so no other row is pushed.
    assert video.grad[0].abs().max() > 0
    assert text.grad[1].abs().max() > 0
    assert video.grad[2:].abs().max() == 0
    assert text.grad[2:].abs().max() == 0


@pytest.mark.parametrize("size", [1, 6])
def test_nothing_to_contrast_is_zero_with_finite_gradients(features, size):
    video, text = (feature[:size].clone().requires_grad_() for feature in features)
    temperature = torch.tensor(0.07, requires_grad=True)
    loss = vtc_loss(video, text, temperature, torch.ones(size, size, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad.abs().max() == 0 for tensor in (video, text, temperature))


def test_autocast_does_not_reach_the_similarities(features):
    video, text = (feature.float() for feature in features)
    temperature = torch.tensor(0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vtc_loss(video, text, temperature)
    assert loss.dtype == torch.float32
    assert loss == vtc_loss(video, text, temperature)
