"""The prompter in its own process: the same labels, and a named error for everything that can happen to it."""

import multiprocessing
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from labellers import (
    Refusing,
    Stuck,
    failing_labeller,
    make_batch,
    real_labeller,
    start_client,
    train_with_prompter,
)

from alpro_stream.errors import PrompterError
from alpro_stream.prompter.client import InlinePrompter

PATIENCE_S = 60


def wait_until(what, condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.02)


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ask(client, batch):
    """Where the news of a death arrives, when submitting or when collecting, depends on how fast it travels."""
    client.submit(batch)
    return client.collect(batch)


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Processes started together, as each takes seconds; every one of them ends in another way."""
    root = tmp_path_factory.mktemp("prompter")
    started = {
        "real": start_client(real_labeller, root / "real.log", lookahead=2),
        "stuck": start_client(partial(Stuck, root / "asked"), root / "stuck.log", deadline_s=PATIENCE_S),
        "raising": start_client(Refusing, root / "raising.log"),
        "not starting": start_client(failing_labeller, root / "failing.log"),
        "killed": start_client(real_labeller, root / "killed.log"),
    }
    os.kill(started["killed"].pid, signal.SIGKILL)
    yield started | {"root": root}
    for client in started.values():
        client.close()
        assert is_gone(client.pid)


def test_labels_are_bit_equal_to_those_of_the_same_labeller_inline(clients):
    client, threads = clients["real"], torch.get_num_threads()
    batches = [make_batch(0), make_batch(1), make_batch(2, size=3), make_batch(3, kind="image")]
    torch.set_num_threads(1)
    try:
        inline = InlinePrompter(real_labeller())
        expected = [inline.collect(batch) for batch in batches]
    finally:
        torch.set_num_threads(threads)
    for batch in batches[:3]:
        client.submit(batch)
    found = [client.collect(batches[0])]
    client.submit(batches[3])
    found += [client.collect(batch) for batch in batches[1:]]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels_BM, theirs.labels_BM)
        assert torch.equal(ours.keep_B, theirs.keep_B)
    assert 0 < sum(labels.keep_B.sum() for labels in found) < sum(map(len, batches))
    assert not torch.equal(found[0].labels_BM, found[1].labels_BM)


def test_no_more_batches_than_the_lookahead_allows_and_in_order(clients):
    client = clients["real"]
    with pytest.raises(PrompterError, match="labels of step 4 were asked for, and none is pending"):
        client.collect(make_batch(4))
    for step in (4, 5, 6):
        client.submit(make_batch(step))
    with pytest.raises(PrompterError, match="3 batches are pending; collect one before submitting another"):
        client.submit(make_batch(7))
    with pytest.raises(PrompterError, match="step 5 were asked for, and the oldest one is of step 4"):
        client.collect(make_batch(5))
    for step in (4, 5, 6):
        client.collect(make_batch(step))


def test_nothing_of_it_has_a_name_in_shared_memory(clients):
    names = [path.name for path in Path("/dev/shm").iterdir()]
    pids = (os.getpid(), *(client.pid for name, client in clients.items() if name != "root"))
    assert not [name for name in names if any(f"_{pid}_" in name for pid in pids)]


def test_killed_before_it_started(clients):
    client = clients["killed"]
    with pytest.raises(PrompterError) as caught:
        ask(client, make_batch(7))
    assert f"prompter of rank 3 (pid {client.pid}) died with exit status -9 when" in str(caught.value)
    assert "step 7" in str(caught.value)
    assert "start the run again, it goes on from its last checkpoint" in str(caught.value)


def test_killed_between_two_batches(clients):
    client = clients["real"]
    ask(client, make_batch(7))
    os.kill(client.pid, signal.SIGKILL)
    wait_until("the kill", lambda: is_gone(client.pid))
    with pytest.raises(PrompterError, match=rf"rank 3 \(pid {client.pid}\) died with exit status -9 when .* step 8"):
        ask(client, make_batch(8))


def test_no_answer_within_the_deadline_and_killed_while_its_labels_are_awaited(clients):
    client = clients["stuck"]
    client.submit(make_batch(2))
    client.submit(make_batch(3))
    wait_until("the question to arrive", (clients["root"] / "asked").exists)
    client._deadline_s = 0.5  # The deadline of the start was longer.
    message = r"gave no answer for 0\.5 s when the labels of step 2 were awaited; raise prompter\.deadline_s"
    with pytest.raises(PrompterError, match=message):
        client.collect(make_batch(2))
    client._deadline_s = PATIENCE_S
    threading.Timer(0.3, os.kill, (client.pid, signal.SIGKILL)).start()
    message = rf"pid {client.pid}\) died with exit status -9 when the labels of step 3 were awaited"
    with pytest.raises(PrompterError, match=message):
        client.collect(make_batch(3))


def test_its_traceback_when_a_batch_makes_it_raise(clients):
    client = clients["raising"]
    client.submit(make_batch(0))
    assert client.collect(make_batch(0)).keep_B.all()
    client.submit(make_batch(1, black=True))
    with pytest.raises(PrompterError) as caught:
        client.collect(make_batch(1, black=True))
    assert re.search(rf"rank 3 \(pid {client.pid}\) failed when the labels of step 1 were awaited", str(caught.value))
    assert "Traceback" in str(caught.value)
    assert "ValueError: a black batch" in str(caught.value)
    assert "a black batch" in (clients["root"] / "raising.log").read_text()


def test_its_traceback_when_it_cannot_start_even_if_nobody_asked_before(clients):
    client = clients["not starting"]
    wait_until("its end", lambda: is_gone(client.pid))
    with pytest.raises(PrompterError) as caught:
        ask(client, make_batch(0))
    assert f"prompter of rank 3 (pid {client.pid}) failed when" in str(caught.value)
    assert "FileNotFoundError: no weights here" in str(caught.value)


def test_closing_twice_is_harmless(clients):
    for _ in range(2):
        clients["raising"].close()
    assert is_gone(clients["raising"].pid)


def test_it_ends_when_its_trainer_is_killed_even_while_it_is_computing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    stuck = partial(Stuck, tmp_path / "asked")
    trainer = context.Process(target=train_with_prompter, args=(theirs, tmp_path / "log", stuck))
    trainer.start()
    theirs.close()
    prompter = ours.recv()
    wait_until("the question to arrive", (tmp_path / "asked").exists)
    assert not is_gone(prompter)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    wait_until("the prompter to end", lambda: is_gone(prompter))
