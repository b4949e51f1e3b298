"""The prompter beside a trainer on a GPU: its memory is shared by CUDA IPC, and its labels are those of one inline."""

import os
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from labellers import SHAPE, make_batch, real_labeller, start_client

from alpro_stream.errors import PrompterError
from alpro_stream.prompter.client import InlinePrompter

NUM_BATCHES = 40


@pytest.fixture
def device(device_id):
    return torch.device("cuda", device_id)


def ask(client, batch):
    client.submit(batch)
    return client.collect(batch)


def keep_busy(device):
    """Work that the stream has not done yet when the batch behind it is handed over."""
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(30):
        matrix = (matrix @ matrix).clamp(-1, 1)
    return matrix


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labels_are_bit_equal_to_those_inline_while_the_trainer_computes(device, tmp_path, precision):
    make_labeller = partial(real_labeller, device, precision=precision)
    inline = InlinePrompter(make_labeller())
    batches = [make_batch(step, kind="image" if step % 5 == 4 else "video") for step in range(NUM_BATCHES)]
    expected = [inline.collect(batch.to(device)) for batch in batches]
    with closing(start_client(make_labeller, tmp_path / "log", device=device)) as client:
        found = []
        for step, batch in enumerate(batches):
            # The copy of the batch into its slot is queued behind this: the labels must wait for it.
            keep_busy(device)
            client.submit(batch.to(device))
            if step:
                found.append(client.collect(batches[step - 1].to(device)))
        found.append(client.collect(batches[-1].to(device)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.labels_BM.device == device
        assert torch.equal(ours.labels_BM, theirs.labels_BM)
        assert torch.equal(ours.keep_B, theirs.keep_B)
    assert not torch.equal(found[0].labels_BM, found[1].labels_BM)


def test_handing_a_batch_over_does_not_wait_for_the_gpu(device, tmp_path):
    with closing(start_client(partial(real_labeller, device), tmp_path / "log", device=device)) as client:
        batch = make_batch(0).to(device)
        ask(client, batch)
        torch.cuda.synchronize(device)
        for _ in range(20):
            keep_busy(device)
        client.submit(batch)
        assert not torch.cuda.current_stream(device).query()
        client.collect(batch)


def test_the_time_of_labels_is_without_the_wait_for_their_batch(device, tmp_path):
    with closing(start_client(partial(real_labeller, device), tmp_path / "log", device=device)) as client:
        batch = make_batch(0).to(device)
        ask(client, batch)
        torch.cuda.synchronize(device)
        started = time.monotonic()
        for _ in range(20):
            keep_busy(device)
        ask(client, batch)
        assert client.labels_s < (time.monotonic() - started) / 2


def test_killed_it_is_a_named_error_and_leaves_nothing_behind(device, tmp_path):
    before = {path.name for path in Path("/dev/shm").iterdir()}
    with closing(start_client(partial(real_labeller, device), tmp_path / "log", device=device)) as client:
        batch = make_batch(0).to(device)
        ask(client, batch)
        os.kill(client.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PrompterError, match=rf"rank 3 \(pid {client.pid}\) died with exit status -9"):
            ask(client, batch)
        assert time.monotonic() - started < 10
    # The trainer's own count of who uses its memory goes with the trainer.
    left = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not [name for name in left if not name.startswith(f"torch_{os.getpid()}_")]
    assert torch.zeros(SHAPE, device=device).sum() == 0
