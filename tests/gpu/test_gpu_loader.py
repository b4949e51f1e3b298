"""Batches that a loader decodes on the GPU, beside a step that computes there."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from stream_parts import IMAGE_SIZE, NUM_FRAMES, open_loader, open_maker, stream_config

from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.testing.shards import write_dataset, write_tokenizer

STEPS = range(20)


@pytest.fixture
def parts(device, tmp_path):
    write_dataset(tmp_path / "train", video_shards=[9, 9], num_frames=9)
    write_tokenizer(tmp_path / "tokenizer")
    maker, plan = open_maker(stream_config(tmp_path))
    maker.decoder.close()
    device_id = torch.cuda.current_device() if device.type == "cuda" else None
    where = "cpu" if device_id is None else "mixed"
    # One ahead: what a batch leaves free is soon asked for again.
    decode = DecodeConfig(device=where, num_workers=1, num_processes=1, prefetch=1)
    decoder = build_clip_decoder(decode, IMAGE_SIZE, 8 * NUM_FRAMES, device_id)
    maker = replace(maker, config=maker.config.model_copy(update={"decode": decode}), decoder=decoder)
    with closing(maker):
        yield maker, plan


def taken_beside_the_step(device, parts, take):
    """What `take` makes of each batch, all but the first while the stream of the step is busy for some seconds.

    That it sleeps leaves all of the GPU to other streams.
    """
    with closing(open_loader(*parts, STEPS)) as loader:
        batches = iter(loader)
        found = [take(next(batches))]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda._sleep(5_000_000_000)
        return found + [take(batch) for batch in batches]


def test_pixels_are_there_when_a_batch_is_taken_while_the_step_computes(device, parts):
    with closing(open_loader(*parts, STEPS)) as loader:
        expected = [batch.frames_BTHWC.cpu() for batch in loader]
    found = taken_beside_the_step(device, parts, lambda batch: batch.frames_BTHWC)
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream(device)):  # Behind nothing.
            found = [frames.cpu() for frames in found]
        assert not torch.cuda.current_stream(device).query(), "something waited for the step"
    assert len(found) == len(STEPS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_memory_of_a_batch_is_not_written_again_before_the_step_has_read_it(device, parts):
    with closing(open_loader(*parts, STEPS)) as loader:
        expected = [int(batch.frames_BTHWC.sum()) for batch in loader]
    assert len(set(expected)) > len(STEPS) / 2
    # Each batch is dropped before the sum of its pixels was begun.
    found = taken_beside_the_step(device, parts, lambda batch: batch.frames_BTHWC.sum())
    assert [int(total) for total in found] == expected
