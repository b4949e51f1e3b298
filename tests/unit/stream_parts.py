"""The parts of a stream over small real shards, for tests."""

import io
import itertools
import threading
from dataclasses import fields, replace

import torch
from PIL import Image

from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.clips import ClipDecoder
from alpro_stream.stream.config import StreamConfig, make_plan
from alpro_stream.stream.decode import FrameDecoder, build_decoder
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import IsolatedDecoder
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.quarantine import Quarantine
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import sample

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
        "decode": {"num_workers": 1, "num_processes": 1, **changes.get("decode", {})},
    }
    return StreamConfig.model_validate(values)


def open_maker(config, wrap=lambda decoder: decoder, rank=0, folder=None, known=()):
    """A maker and its plan, all parts real; `wrap` may put something around the decoder of stored frames.

    `folder` gets the record of unusable samples, of which those in `known` are known.
    """
    sources = open_sources(config.sources, config.unit)
    tokenizer = Tokenizer(config.text.tokenizer, config.text.num_tokens)
    frames = wrap(build_decoder(config.decode, IMAGE_SIZE, config.global_batch * NUM_FRAMES, None))
    decode, gauges = config.decode, Gauges()
    isolated = IsolatedDecoder(decode.num_processes, decode.deadline_s, decode.memory_mb)
    decoder = ClipDecoder(frames, isolated, IMAGE_SIZE, gauges=gauges)
    quarantine = Quarantine(config.quarantine, rank, folder, known)
    maker = BatchMaker(config, sources, tokenizer, decoder, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE, quarantine, gauges)
    return maker, make_plan(config, sources)


class Wrapped(FrameDecoder):
    """A decoder of stored frames around another one; to be derived from, with another `decode`."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.device, self.needs_trial = decoder.device, decoder.needs_trial

    def empty(self, shape):
        return self._decoder.empty(shape)

    def start(self, requests, out_NHWC, rows):
        return lambda: self.decode(requests, out_NHWC, rows)

    def decode(self, requests, out_NHWC, rows):
        return self._decoder.decode(requests, out_NHWC, rows)

    def close(self):
        self._decoder.close()


def stored_as(data, name="JPEG", mode="RGB", **options):
    """The same picture in another format: a progressive JPEG, for example, is none that the fast decoders are given."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert(mode).save(file, name, **options)
    return file.getvalue()


def write_clips(folder, sizes, frames_of, size=32):
    """A data set of video clips, in shards of so many; `frames_of` gives the stored frames of a clip by its number."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, infos = itertools.count(), []
    for shard, count in enumerate(sizes):
        with ShardWriter(folder, f"video-{shard:06d}", "video") as writer:
            for number in itertools.islice(numbers, count):
                frames = tuple(frames_of(number))
                writer.add(replace(sample(number, "video", len(frames), size), frames=frames))
            infos.append(writer.close())
    save_dataset_info(folder, DatasetInfo.of_shards(folder.name, {"frames": {"size": size}}, infos))


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


# Those of commands that other tests ran in this process; they end with it.
OF_COMMANDS = ("alpro-stop-request", "alpro-preflight")


def loader_threads():
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("alpro-") and thread.name not in OF_COMMANDS
    ]


def assert_batches_equal(found, expected):
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other, field.name
