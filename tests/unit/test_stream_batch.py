from dataclasses import fields, replace

import pytest
import torch

from alpro_stream.stream.batch import Batch


@pytest.fixture
def batch():
    """Four lanes of two samples; every tensor says in its first column which sample a row is of."""
    row_B = torch.arange(8)
    tokens_BL = torch.stack([row_B, row_B + 100, row_B + 200], dim=1)
    return Batch(
        step=3,
        source="video",
        kind="video",
        first_lane=4,
        num_lanes=4,
        keys=tuple(f"k{row}" for row in range(8)),
        captions=tuple(f"caption {row}" for row in range(8)),
        frames_BTHWC=row_B.to(torch.uint8).view(8, 1, 1, 1, 1).expand(8, 2, 4, 4, 3).clone(),
        ids_BL=tokens_BL,
        mask_BL=tokens_BL,
        mlm_ids_BL=tokens_BL,
        mlm_labels_BL=tokens_BL,
        boxes_B4=row_B.view(8, 1).expand(8, 4).clone(),
        video_id_B=row_B,
        text_id_B=row_B,
        noise_B2N=row_B.float().view(8, 1, 1).expand(8, 2, 2).clone(),
        valid_B=row_B % 3 != 1,
        answers=tuple(f"answer {row}" for row in range(8)),
        num_quarantined=3,
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_cut_between_lanes(batch, count):
    parts = batch.micro_batches(count)
    assert [part.first_lane for part in parts] == [4 + number * 4 // count for number in range(count)]
    for number, part in enumerate(parts):
        rows = list(range(number * 8 // count, (number + 1) * 8 // count))
        assert (part.num_lanes, len(part)) == (4 // count, 8 // count)
        assert part.keys == tuple(f"k{row}" for row in rows)
        assert part.captions == tuple(f"caption {row}" for row in rows)
        assert part.answers == tuple(f"answer {row}" for row in rows)
        assert part.valid_B.tolist() == [row % 3 != 1 for row in rows]
        assert (part.step, part.source, part.kind) == (3, "video", "video")
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, torch.Tensor) and value.dtype != torch.bool:
                assert value.reshape(len(rows), -1)[:, 0].tolist() == rows
    assert sum(part.num_quarantined for part in parts) == 3


def test_bytes_are_those_of_all_tensors(batch):
    pixels, tokens, box, identities, noise, valid = 2 * 4 * 4 * 3, 4 * 3 * 8, 4 * 8, 2 * 8, 2 * 2 * 4, 1
    assert batch.num_bytes == 8 * (pixels + tokens + box + identities + noise + valid)
    assert sum(part.num_bytes for part in batch.micro_batches(4)) == batch.num_bytes


@pytest.mark.parametrize("count", [3, 8])
def test_a_lane_is_never_split(batch, count):
    with pytest.raises(ValueError, match=f"4 lanes cannot be cut into {count}"):
        batch.micro_batches(count)


def test_to_moves_every_tensor_and_keeps_the_rest(batch):
    moved = batch.to(torch.device("meta"))
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        else:
            assert after == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids_BL", torch.zeros(7, 3)),
        ("mask_BL", torch.zeros(8, 4)),
        ("mlm_ids_BL", torch.zeros(8, 4)),
        ("mlm_labels_BL", torch.zeros(8, 2)),
        ("boxes_B4", torch.zeros(8, 3)),
        ("video_id_B", torch.zeros(7)),
        ("text_id_B", torch.zeros(8, 1)),
        ("noise_B2N", torch.zeros(7, 2, 2)),
        ("noise_B2N", torch.zeros(8, 2, 8)),
        ("frames_BTHWC", torch.zeros(7, 2, 4, 4, 3, dtype=torch.uint8)),
        ("frames_BTHWC", torch.zeros(8, 2, 3, 4, 4, dtype=torch.uint8)),
        ("frames_BTHWC", torch.zeros(8, 4, 4, 3, dtype=torch.uint8)),
        ("frames_BTHWC", torch.zeros(8, 2, 4, 4, 3)),
        ("captions", ("one caption",)),
        ("answers", ("one answer",)),
        ("valid_B", torch.ones(7, dtype=torch.bool)),
        ("valid_B", torch.ones(8)),
    ],
)
def test_parts_that_do_not_fit_are_named(batch, name, value):
    with pytest.raises(ValueError, match=rf"Batch\.{name}"):
        replace(batch, **{name: value})


def test_lanes_hold_whole_samples(batch):
    with pytest.raises(ValueError, match="8 samples are not a whole number for each of 3 lanes"):
        replace(batch, num_lanes=3)
