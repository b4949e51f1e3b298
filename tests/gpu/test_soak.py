"""Memory of a GPU over as many exchanges and clips as tell growth from noise; the last file, as it takes longest."""

import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from labellers import make_batch, real_labeller, start_client

from alpro_stream.stream.beside import Beside
from alpro_stream.stream.decode import DecodeConfig, FrameRequest
from alpro_stream.stream.view import View
from alpro_stream.testing.shards import picture

NUM_EXCHANGES, NUM_CLIPS = 10_000, 100_000
# Ends the clips early on a slow machine.
MOST_S = 50
# Eight of the pieces in which PyTorch and DALI take memory; of an exchange or a clip that is lost, thousands are lost.
MOST_GROWTH = 2**24
BATCH, NUM_FRAMES, STORED_SIZE, SIZE = 64, 4, 80, 64


def taken(device):
    """Bytes of the GPU that are not free, whoever has them; none on a CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def growth(memory):
    """From the middle to the end."""
    return memory[-1] - memory[len(memory) // 2]


def test_exchanges_with_the_prompter_take_no_more_memory(device, tmp_path, record_property):
    count = NUM_EXCHANGES if device.type == "cuda" else 40
    memory = []
    with closing(start_client(partial(real_labeller, device), tmp_path / "log", device=device)) as client:
        batch = make_batch(0).to(device)
        client.submit(batch)
        for number in range(count):
            client.submit(batch)  # One ahead, as a trainer does.
            client.collect(batch)
            if (number + 1) % (count // 20) == 0:
                memory.append(taken(device))
    record_property("bytes_in_the_second_half", growth(memory))
    assert growth(memory) < MOST_GROWTH


def test_decoded_clips_take_no_more_memory(device, record_property):
    from alpro_stream.stream.dali import DaliDecoder

    is_cuda = device.type == "cuda"
    config = DecodeConfig(device="mixed" if is_cuda else "cpu", backend="dali", num_workers=4)
    decoder = DaliDecoder(config, SIZE, BATCH * NUM_FRAMES, torch.cuda.current_device() if is_cuda else None)
    cropped = View((8 / STORED_SIZE, 8 / STORED_SIZE, SIZE / STORED_SIZE, SIZE / STORED_SIZE))
    views = [cropped, View(), replace(cropped, operations=(("rotate", 15.0), ("contrast", 0.5)))]
    requests = [
        FrameRequest(picture(clip, frame, STORED_SIZE), STORED_SIZE, STORED_SIZE, views[clip % len(views)])
        for clip in range(BATCH)
        for frame in range(NUM_FRAMES)
    ]
    beside, deadline = Beside(device), time.monotonic() + MOST_S
    memory, num_clips = [], 0
    with closing(decoder):
        while num_clips < (NUM_CLIPS if is_cuda else 2 * BATCH) and time.monotonic() < deadline:
            # As the loader does it, and then the step.
            with beside.entered():
                out = decoder.empty((len(requests), SIZE, SIZE, 3))
                assert decoder.decode(requests, out, range(len(requests))) == {}
            beside.wait()
            beside.lend(out)
            assert out.float().mean() > 0
            num_clips += BATCH
            memory.append(taken(device))
    record_property("clips", num_clips)
    record_property("bytes_in_the_second_half", growth(memory))
    assert growth(memory) < MOST_GROWTH
