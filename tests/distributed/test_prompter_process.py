"""The prompter in its own process: the same labels, and a named error for everything that can happen to it."""

import gc
import multiprocessing
import os
import re
import signal
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from labellers import (
    Leaking,
    Refusing,
    Stuck,
    damaged_labeller,
    failing_labeller,
    make_batch,
    real_labeller,
    start_client,
    starting_for_ever,
    train_with_prompter,
)

from alpro_stream.errors import PrompterError
from alpro_stream.prompter.client import InlinePrompter

PATIENCE_S = 120
# A death is noticed at once, whatever the deadline is.
SOON_S = 5


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


@contextmanager
def soon():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON_S


def growth_kib(client, exchanges, warmup=200):
    """By how much the memory of the prompter and of this process grows, and that of open files."""

    def taken():
        gc.collect()
        for process in processes:
            infos = process.memory_full_info(), process.num_fds()
            yield infos[0].uss / 1024, infos[1]

    processes = (psutil.Process(client.pid), psutil.Process())
    batch = make_batch(0)
    for number in range(warmup + exchanges):
        if number == warmup:
            before = list(taken())
        ask(client, batch)
    return [(kib - first, fds - fewest) for (kib, fds), (first, fewest) in zip(taken(), before, strict=True)]


def ask(client, batch):
    """Where the news of a death arrives, when submitting or when collecting, depends on how fast it travels."""
    client.submit(batch)
    return client.collect(batch)


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Processes started together, as each takes seconds; every one of them ends in another way."""
    root = tmp_path_factory.mktemp("prompter")
    (root / "killed.log").write_text("of the sitting before\n")
    started = {
        "real": start_client(real_labeller, root / "real.log", lookahead=2),
        "stuck": start_client(partial(Stuck, root / "asked"), root / "stuck.log", deadline_s=PATIENCE_S),
        "raising": start_client(Refusing, root / "raising.log"),
        "not starting": start_client(failing_labeller, root / "failing.log"),
        "damaged": start_client(damaged_labeller, root / "damaged.log"),
        "killed": start_client(real_labeller, root / "killed.log"),
        "starting": start_client(partial(starting_for_ever, root / "starting"), root / "starting.log"),
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


def test_memory_of_hundreds_of_exchanges_is_flat(clients):
    for kib, files in growth_kib(clients["real"], 400):
        assert kib < 2048
        assert files <= 0


def test_killed_before_it_started(clients):
    client = clients["killed"]
    with soon(), pytest.raises(PrompterError) as caught:
        ask(client, make_batch(7))
    assert f"prompter of rank 3 (pid {client.pid}) died with exit status -9 when" in str(caught.value)
    assert "step 7" in str(caught.value)
    assert "start the run again, it goes on from its last checkpoint" in str(caught.value)
    # What it printed is told, and not what another one did into the same file.
    assert "sitting before" not in str(caught.value)
    first, second = (clients["root"] / "killed.log").read_text().splitlines()[:2]
    assert first == "of the sitting before"
    assert second.startswith("--- started 2")


def test_frozen_and_then_killed_between_two_batches(clients):
    client = clients["real"]
    ask(client, make_batch(7))
    os.kill(client.pid, signal.SIGSTOP)
    client._deadline_s = 0.5
    with (
        soon(),
        pytest.raises(PrompterError, match=r"gave no answer for 0\.5 s when the labels of step 8 were awaited"),
    ):
        ask(client, make_batch(8))
    client._deadline_s = PATIENCE_S
    os.kill(client.pid, signal.SIGKILL)
    wait_until("the kill", lambda: is_gone(client.pid))
    message = rf"rank 3 \(pid {client.pid}\) died with exit status -9 when .* step 9"
    with soon(), pytest.raises(PrompterError, match=message):
        ask(client, make_batch(9))


def test_it_hangs_at_its_start_and_is_killed_there(clients):
    client = clients["starting"]
    client.submit(make_batch(0))
    client.submit(make_batch(1))
    wait_until("the start", (clients["root"] / "starting").exists)
    client._deadline_s = 0.5
    message = r"rank 3 .* gave no answer for 0\.5 s when its start and the labels of step 0 were awaited; raise"
    with soon(), pytest.raises(PrompterError, match=message):
        client.collect(make_batch(0))
    client._deadline_s = PATIENCE_S
    threading.Timer(0.3, os.kill, (client.pid, signal.SIGKILL)).start()
    message = r"died with exit status -9 when its start and the labels of step 1 were awaited"
    with soon(), pytest.raises(PrompterError, match=message):
        client.collect(make_batch(1))


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
    with soon(), pytest.raises(PrompterError, match=message):
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


def test_one_line_where_a_user_can_do_something_about_it(clients):
    client = clients["damaged"]
    with pytest.raises(PrompterError) as caught:
        ask(client, make_batch(0))
    assert re.fullmatch(
        rf"the prompter of rank 3 \(pid {client.pid}\) failed when .*: model.safetensors: a truncated one",
        str(caught.value),
    )


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


def test_it_ends_when_its_trainer_is_killed_while_it_computes_and_leaves_nothing_behind(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    stuck = partial(Stuck, tmp_path / "asked")
    trainer = context.Process(target=train_with_prompter, args=(theirs, tmp_path / "log", stuck))
    trainer.start()
    theirs.close()
    prompter = ours.recv()
    named = Path(f"/dev/shm/torch_{trainer.pid}_1_0")
    wait_until("the question to arrive", (tmp_path / "asked").exists)
    assert not is_gone(prompter)
    assert named.exists()
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    wait_until("the prompter to end", lambda: is_gone(prompter))
    assert not named.exists()


@pytest.mark.slow
def test_memory_of_ten_thousand_exchanges_is_flat_and_a_leak_would_be_seen(tmp_path):
    with closing(start_client(real_labeller, tmp_path / "log", deadline_s=PATIENCE_S)) as client:
        for kib, files in growth_kib(client, 10_000):
            assert kib < 2048
            assert files <= 0
    with closing(start_client(Leaking, tmp_path / "leaking.log", deadline_s=PATIENCE_S)) as client:
        (kib, _), (ours, _) = growth_kib(client, 400)
        assert kib > 10 * 1024  # 55 KB of each batch
        assert ours < 2048
