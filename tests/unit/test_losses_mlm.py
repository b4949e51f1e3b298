import math

import pytest
import torch

from alpro_stream.losses.mlm import mlm_loss


def slow_mlm(logits, labels):
    losses = []
    for row, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, label in zip(row, row_labels, strict=True):
            if label != -100:
                losses.append(-math.log(math.exp(scores[label]) / sum(map(math.exp, scores))))
    return sum(losses) / len(losses)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits_BLV = torch.randn(3, 4, 7, dtype=torch.float64, generator=generator)
    labels_BL = torch.tensor([[-100, 6, -100, 0], [-100] * 4, [3, -100, -100, -100]])
    return logits_BLV, labels_BL


def test_equals_the_slow_loss(batch):
    assert mlm_loss(*batch).item() == pytest.approx(slow_mlm(*batch), abs=1e-12)


def test_parts_with_a_common_count_add_up(batch):
    logits_BLV, labels_BL = batch
    parts = [mlm_loss(logits_BLV[rows], labels_BL[rows], torch.tensor(3.0)) for rows in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(sum(parts), mlm_loss(*batch))


@pytest.mark.parametrize("num_masked", [None, torch.tensor(0)])
def test_no_masked_token_is_zero_with_zero_gradients(batch, num_masked):
    logits_BLV = batch[0].clone().requires_grad_()
    loss = mlm_loss(logits_BLV, torch.full((3, 4), -100), num_masked)
    loss.backward()
    assert loss.item() == 0
    assert logits_BLV.grad.abs().max() == 0


def test_bfloat16_logits_give_a_float32_loss(batch):
    logits_BLV, labels_BL = batch[0].bfloat16(), batch[1]
    assert mlm_loss(logits_BLV, labels_BL).dtype == torch.float32
    assert mlm_loss(logits_BLV, labels_BL) == mlm_loss(logits_BLV.float(), labels_BL)
