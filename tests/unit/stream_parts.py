"""The parts of a stream over small real shards, for tests."""

import threading
from dataclasses import fields

import numpy as np
import torch

from alpro_stream.stream.clips import ClipDecoder
from alpro_stream.stream.config import StreamConfig, make_plan
from alpro_stream.stream.decode import build_decoder
from alpro_stream.stream.isolated import IsolatedDecoder
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.quarantine import Quarantine
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import Tokenizer

NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE = 4, 28, 4


def stream_config(root, **changes):
    """Settings over the data set ``root/train``: 4 lanes, global batches of 8."""
    values = {
        "sources": [{"path": root / "train"}],
        "global_batch": 8,
        "num_lanes": 4,
        "window_shards": 2,
        "text": {"tokenizer": str(root / "tokenizer"), "num_tokens": 12},
        **changes,
        # One process is started faster than two, and few tests care.
        "decode": {"num_threads": 1, "num_processes": 1, **changes.get("decode", {})},
    }
    return StreamConfig.model_validate(values)


def open_maker(config, wrap=lambda decoder: decoder, rank=0, folder=None, known=()):
    """A maker and its plan, all parts real; `wrap` may put something around the decoder of stored frames.

    `folder` gets the record of unusable samples, of which those in `known` are known.
    """
    sources = open_sources(config.sources, config.unit)
    tokenizer = Tokenizer(config.text.tokenizer, config.text.num_tokens)
    frames = wrap(build_decoder(config.decode, IMAGE_SIZE, config.global_batch * NUM_FRAMES, None))
    decode = config.decode
    decoder = ClipDecoder(frames, IsolatedDecoder(decode.num_processes, decode.deadline_s, decode.memory_mb))
    quarantine = Quarantine(config.quarantine, rank, folder, known)
    maker = BatchMaker(config, sources, tokenizer, decoder, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE, quarantine)
    return maker, make_plan(config, sources)


def open_loader(maker, plan, steps, rank=0, world_size=1):
    return Loader(maker, plan, rank=rank, world_size=world_size, first_step=steps.start, last_step=steps.stop)


def read_all(maker, plan, steps, rank=0, world_size=1):
    """The batches of these steps, through a loader that is closed afterwards."""
    loader = open_loader(maker, plan, steps, rank, world_size)
    try:
        return list(loader)
    finally:
        loader.close()
        maker.close()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("alpro-")]


def assert_batches_equal(found, expected):
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other, field.name


def assert_pixels_equal(found, expected):
    """The one tolerance for two decoders: roundings of the JPEG transform and of the interpolation."""
    difference = np.abs(found.numpy().astype(int) - expected.astype(int))
    assert difference.mean() < 0.3
    assert difference.max() <= 4
