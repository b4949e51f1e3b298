import math

import pytest
import torch
from pydantic import ValidationError

from alpro_stream.losses.pem import PemConfig, box_to_mask, keep_and_renormalise, pem_loss, pool_region

Q_BM = torch.tensor(
    [
        [0.7, 0.2, 0.1],  # confident in entity 0: only the rule of the authors' code drops it
        [0.1, 0.6, 0.3],
        [0.15, 0.19, 0.66],
    ]
)
FLAT_BM = torch.full((2, 8), 0.125)


def test_rule_sample_drops_by_the_largest_probability():
    labels_BM, keep_B = keep_and_renormalise(Q_BM, Q_BM.log(), "sample", 0.65)
    assert keep_B.tolist() == [True, False, True]
    assert torch.equal(labels_BM, Q_BM)
    assert not keep_and_renormalise(FLAT_BM, FLAT_BM, "sample", 0.2)[1].any()
    assert keep_and_renormalise(FLAT_BM, FLAT_BM, "sample", 0.125)[1].all()


def test_rule_entity_removes_entities_and_renormalises():
    labels_BM, keep_B = keep_and_renormalise(torch.cat([Q_BM, torch.full((1, 3), 0.19)]), Q_BM, "entity", 0.2)
    assert keep_B.tolist() == [True, True, True, False]
    expected = [[0.7 / 0.9, 0.2 / 0.9, 0], [0, 0.6 / 0.9, 0.3 / 0.9], [0, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(labels_BM, torch.tensor(expected))


def test_rule_reference_drops_entity_zero_however_confident():
    labels_BM, keep_B = keep_and_renormalise(Q_BM, Q_BM.log(), "reference", 0.2)
    assert keep_B.tolist() == [False, True, True]
    assert torch.equal(labels_BM, Q_BM)
    flat_but_last = torch.eye(8)[7:] * 0.01
    assert keep_and_renormalise(flat_but_last.softmax(1), flat_but_last, "reference", 0.2)[1].all()


def test_box_to_mask_is_row_by_row():
    inside_BP = box_to_mask(torch.tensor([[1, 0, 2, 1], [0, 0, 3, 3]]), 3)
    assert inside_BP.int().tolist() == [[0, 0, 0, 1, 0, 0, 1, 0, 0], [1] * 9]


@pytest.mark.parametrize("region", ["crop", "context"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pooling_equals_a_loop_over_patches(pool, region):
    patches_BPD = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    inside_BP = box_to_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2], [0, 1, 3, 1]]), 3)
    pooled_BD = pool_region(patches_BPD, inside_BP, pool, region)
    for b in range(3):
        chosen = [patches_BPD[b, p] for p in range(9) if bool(inside_BP[b, p]) == (region == "crop")]
        stacked = torch.stack(chosen)
        expected = stacked.mean(0) if pool == "mean" else stacked.max(0).values
        torch.testing.assert_close(pooled_BD[b], expected)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_an_empty_region_is_zero_with_finite_gradients(pool):
    patches_BPD = torch.randn(2, 4, 3, requires_grad=True)
    inside_BP = torch.tensor([[True] * 4, [True, False, False, False]])
    pooled_BD = pool_region(patches_BPD, inside_BP, pool, "context")
    pooled_BD.square().sum().backward()
    assert pooled_BD[0].abs().max() == 0
    assert patches_BPD.grad[0].abs().max() == 0
    assert patches_BPD.grad[1, 0].abs().max() == 0
    assert patches_BPD.grad[1, 1:].abs().max() > 0
    assert patches_BPD.grad.isfinite().all()


def slow_pem(logits, labels, keep):
    losses = []
    for row, target, kept in zip(logits.tolist(), labels.tolist(), keep.tolist(), strict=True):
        total = sum(map(math.exp, row))
        if kept:
            losses.append(-sum(q * math.log(math.exp(x) / total) for q, x in zip(target, row, strict=True)))
    return sum(losses) / len(losses)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits_BM, similarity_BM = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    return logits_BM, similarity_BM.softmax(1), torch.tensor([True, False, True, True, False])


def test_pem_equals_the_slow_loss(batch):
    assert pem_loss(*batch).item() == pytest.approx(slow_pem(*batch), abs=1e-12)


def test_parts_with_a_common_count_add_up(batch):
    parts = [pem_loss(*(tensor[rows] for tensor in batch), torch.tensor(3.0)) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), pem_loss(*batch))


@pytest.mark.parametrize("num_kept", [None, torch.tensor(0)])
def test_all_samples_ignored_is_zero_with_zero_gradients(batch, num_kept):
    logits_BM = batch[0].clone().requires_grad_()
    loss = pem_loss(logits_BM, batch[1], torch.zeros(5, dtype=torch.bool), num_kept)
    loss.backward()
    assert loss.item() == 0
    assert logits_BM.grad.abs().max() == 0


@pytest.mark.parametrize("values", [{"pool": "sum"}, {"ignore": "index"}, {"threshold": 1.5}, {"weight": -1}])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValidationError):
        PemConfig(**values)
