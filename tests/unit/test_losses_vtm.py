import math

import pytest
import torch

from alpro_stream.losses.vtm import sample_negatives, vtm_loss


def exponential(*shape, seed=0):
    return torch.empty(*shape).exponential_(generator=torch.Generator().manual_seed(seed))


def test_negatives_follow_the_softmax_over_the_allowed():
    similarity_M = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.5])
    allowed_M = torch.tensor([True, False, True, True, True])
    num_draws = 40_000
    index_N, valid_N = sample_negatives(
        similarity_M.expand(num_draws, -1), allowed_M.expand(num_draws, -1), exponential(num_draws, 5)
    )
    expected = [math.exp(s) if a else 0.0 for s, a in zip(similarity_M.tolist(), allowed_M.tolist(), strict=True)]
    counts = torch.bincount(index_N, minlength=5).tolist()
    assert valid_N.all()
    assert counts[1] == 0
    for count, weight in zip(counts, expected, strict=True):
        probability = weight / sum(expected)
        spread = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(count - num_draws * probability) <= 4 * spread


@pytest.mark.parametrize("seed", range(5))
def test_a_forbidden_candidate_is_never_drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    allowed_NN = torch.rand(50, 50, generator=generator) < 0.05
    similarity_NN = torch.where(allowed_NN, -50.0, 50.0)  # everything speaks for the forbidden ones
    index_N, valid_N = sample_negatives(similarity_NN, allowed_NN, exponential(50, 50, seed=seed))
    assert torch.equal(valid_N, allowed_NN.any(1))
    assert not valid_N.all()
    assert allowed_NN[torch.arange(50), index_N][valid_N].all()
    assert index_N[~valid_N].eq(0).all()


def test_the_draw_is_the_winner_of_the_race():
    similarity_NN, noise_NN = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), exponential(8, 8)
    allowed_NN = ~torch.eye(8, dtype=torch.bool)
    index_N, _ = sample_negatives(similarity_NN, allowed_NN, noise_NN)
    for i in range(8):
        arrivals = {j: float(noise_NN[i, j]) / math.exp(similarity_NN[i, j]) for j in range(8) if j != i}
        assert index_N[i] == min(arrivals, key=arrivals.get)


def test_a_batch_of_one_has_no_negative():
    index_N, valid_N = sample_negatives(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1))
    assert (index_N.tolist(), valid_N.tolist()) == ([0], [False])


def slow_vtm(logits, labels, weights):
    total = 0.0
    for row, label, weight in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True):
        total -= weight * math.log(math.exp(row[label]) / (math.exp(row[0]) + math.exp(row[1])))
    return total / sum(weights.tolist())


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 2, dtype=torch.float64, generator=generator), torch.tensor([1, 0, 0] * 3)


@pytest.mark.parametrize("weights", [[1.0] * 9, [1, 0, 1, 0, 0, 1, 1, 1, 0], [0.05] * 9])
def test_vtm_equals_the_slow_loss(pairs, weights):
    weights_R = torch.tensor(weights, dtype=torch.float64)
    assert vtm_loss(*pairs, weights_R).item() == pytest.approx(slow_vtm(*pairs, weights_R), abs=1e-12)


def test_parts_with_a_common_total_add_up(pairs):
    logits_R2, labels_R = pairs
    weights_R = torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1, 0], dtype=torch.float64)
    parts = [
        vtm_loss(logits_R2[rows], labels_R[rows], weights_R[rows], weights_R.sum())
        for rows in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(sum(parts), vtm_loss(logits_R2, labels_R, weights_R))


@pytest.mark.parametrize("total", [None, torch.tensor(0.0)])
def test_no_pair_is_zero_with_zero_gradients(pairs, total):
    logits_R2 = pairs[0].clone().requires_grad_()
    loss = vtm_loss(logits_R2, pairs[1], torch.zeros(9), total)
    loss.backward()
    assert loss.item() == 0
    assert logits_R2.grad.abs().max() == 0
