"""How ranks find each other, with threads for ranks: who is missing, who runs something else, whose port it is."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict

import pytest
from torch.distributed import PrefixStore, TCPStore

from alpro_launch.local_ranks import free_port
from alpro_stream.config import save_config
from alpro_stream.errors import AlproError, ConfigError, OtherRankError, RankError, TakenError
from alpro_stream.exit_status import HARDWARE
from alpro_stream.run import RunConfig
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.train import rendezvous
from alpro_stream.train.callers import Caller, describe_absent, describe_differences
from alpro_stream.train.rendezvous import _HEARD, _RUN, _VERDICT, Meeting, meet
from alpro_stream.train.roll_call import State, ask

SAME = {"alpro-stream": "1.0", "torch": "2.11"}


def meeting(port, versions, num_ranks=None, timeout_s=20.0, delays=None, run="the training in /a"):
    """What `meet` gives on each of these ranks."""

    def call(rank):
        time.sleep((delays or {}).get(rank, 0))
        where = Meeting(run, num_ranks or len(versions), "127.0.0.1", port, timeout_s, time.monotonic())
        try:
            return meet(rank, where, versions[rank])
        except AlproError as error:
            return error

    with ThreadPoolExecutor(max_workers=len(versions)) as pool:
        return dict(zip(versions, pool.map(call, versions), strict=True))


def test_ranks_meet_whoever_is_late():
    stores = meeting(free_port(), {0: SAME, 1: SAME, 2: SAME}, delays={0: 0.5, 2: 0.2})
    stores[1].set("key", "of the process group")
    assert stores[2].get("key") == b"of the process group"


def test_the_ranks_that_did_not_come_are_named_on_all_others():
    start = time.monotonic()
    found = meeting(free_port(), {0: SAME, 2: SAME}, num_ranks=5, timeout_s=1.5)
    assert time.monotonic() - start < 6
    assert (type(found[0]), found[0].fault) == (RankError, "hardware")
    assert str(found[0]).startswith("ranks 1, 3-4 of 5 did not come within 1.5 s; there are ranks 0, 2 on")
    assert socket.gethostname() in str(found[0])
    assert (type(found[2]), str(found[2]), found[2].fault) == (OtherRankError, str(found[0]), "hardware")


def test_other_programs_are_named_on_all_ranks():
    found = meeting(free_port(), {0: SAME, 1: SAME | {"alpro-stream": "1.1"}, 2: SAME})
    host = socket.gethostname()
    assert str(found[0]) == (
        f"the ranks run different programs: alpro-stream 1.0 on {host} (ranks 0, 2) and 1.1 on {host} (rank 1). "
        "Install the same on all"
    )
    assert isinstance(found[0], ConfigError)
    for rank in (1, 2):
        assert (str(found[rank]), found[rank].fault) == (str(found[0]), "configuration")


def test_the_first_rank_ends_after_the_others_have_heard_it():
    """The store ends with it. Rank 2 did not come, and is not waited for."""
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meeting, port, {0: SAME}, num_ranks=3, timeout_s=4)
        while connects(port):
            time.sleep(0.02)
        root = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        root.wait([_RUN])
        store = PrefixStore("alpro/0", root)
        store.set("1", json.dumps(asdict(Caller("node1", SAME))))
        store.wait([_VERDICT])
        with pytest.raises(FutureTimeout):
            first.result(timeout=0.7)
        store.add(_HEARD, 1)
        assert str(first.result(timeout=5)[0]).startswith("rank 2 of 3 did not come")


def connects(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port))


def test_a_rank_of_another_run_is_told_at_once_and_leaves_the_first_in_peace():
    """As of a run on the same first host, whose own first rank found the port taken."""
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meeting, port, {0: SAME, 1: SAME}, delays={1: 2.5})
        start = time.monotonic()
        found = meeting(port, {0: SAME, 1: SAME}, delays={0: 0.5}, run="the training in /b with 2 ranks")
        assert time.monotonic() - start < 2
        stores = first.result(timeout=20)
    assert [type(found[rank]) for rank in (0, 1)] == [TakenError, TakenError]
    assert [found[rank].fault for rank in (0, 1)] == ["hardware", "hardware"]
    assert f"port {port} of {socket.gethostname()}, on which the ranks meet, is taken" in str(found[0])
    assert str(found[1]).startswith(
        f"another run has 127.0.0.1:{port}: the training in /a, and this rank is one of the training in /b with 2 "
        "ranks. Choose another port for this run, on all hosts: --master-port"
    )
    stores[0].set("key", "of the first run")
    assert stores[1].get("key") == b"of the first run"


def test_a_rank_that_is_there_already_is_not_taken_for_another():
    """As of an attempt whose first rank is still ending: its store would be that of a group that is gone."""
    port = free_port()
    stores = meeting(port, {0: SAME, 1: SAME})
    start = time.monotonic()
    again = meeting(port, {1: SAME}, num_ranks=2)[1]
    assert time.monotonic() - start < 5
    assert isinstance(again, TakenError)
    assert str(again).startswith("another process is rank 1 of the training in /a already, which meets at 127.0.0.1:")
    del stores


def test_one_deadline_for_all_that_a_rank_waits_for(monkeypatch):
    """A rank that has waited for the name of the first machine does not wait as long once more, for nobody."""
    monkeypatch.setattr(rendezvous, "_GRACE_S", 1.0)
    waited_before = Meeting("a run", 2, "127.0.0.1", free_port(), 60.0, time.monotonic() - 59)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 waited 6[01] s for the first rank"):
        meet(1, waited_before, SAME)
    assert time.monotonic() - start < 5
    # Connected at the last moment: the others are not waited for once more.
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set(_RUN, "a run")
    late = Meeting("a run", 3, "127.0.0.1", server.port, 60.0, time.monotonic() - 59)
    start = time.monotonic()
    with pytest.raises(RankError, match="in vain: only rank 1 of 3 have come"):
        meet(1, late, SAME)
    assert time.monotonic() - start < 10


_LATE_NAME = """
import socket, sys, time
import alpro_stream.run
from alpro_launch import topology
from alpro_launch.train import main

has_name_at = time.monotonic() + 4

def own_host(address):
    if time.monotonic() < has_name_at:
        raise socket.gaierror("unknown")
    return "127.0.0.1"

topology.own_host = own_host
status = main(sys.argv[1:])
print(time.monotonic() - has_name_at)
sys.exit(status)
"""


def test_the_wait_for_the_name_of_the_first_machine_is_part_of_that(tmp_path):
    """By the entry of a rank, whose first one never listens."""
    config = tmp_path / "run.yaml"
    run = tiny_run(write_corpus(tmp_path / "corpus"), tmp_path / "run", {"train.timeout_s": 5})
    save_config(RunConfig.model_validate(run), config)
    place = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    names = {name: str(value) for name, value in {**place, "GLOO_SOCKET_IFNAME": "lo"}.items()}
    command = [sys.executable, "-c", _LATE_NAME, str(config)]
    done = subprocess.run(
        command, env={**os.environ, **names}, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == HARDWARE, done.stderr
    assert re.search(r"rank 1: error: rank 1 waited [5-7] s for the first rank at 127\.0\.0\.1:", done.stderr)
    # One second; a wait of its own would be five.
    assert float(done.stdout.split()[-1]) < 4.5


def test_without_the_first_rank_nobody_listens():
    found = meeting(free_port(), {1: SAME}, num_ranks=2, timeout_s=1.0)[1]
    assert re.search(r"rank 1 waited [1-3] s for the first rank at 127\.0\.0\.1:", str(found))
    assert "nobody listens there: the first rank was not started, or has ended" in str(found)
    assert found.fault == "hardware"


def test_a_port_that_another_program_has():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        start = time.monotonic()
        found = meeting(port, {0: SAME, 1: SAME}, timeout_s=60.0)
        assert time.monotonic() - start < 20
    assert str(found[0]).startswith(f"port {port} of {socket.gethostname()}, on which the ranks meet, is taken")
    assert "--master_port of deepspeed" in str(found[0])
    assert [type(found[0]), found[0].fault, found[1].fault] == [TakenError, "hardware", "hardware"]
    assert "something listens there and does not answer: another program has the port" in str(found[1])


FIRST_OF_THREE = """
import sys, time
from alpro_stream.train.rendezvous import Meeting, meet
meet(0, Meeting("a run", 3, "127.0.0.1", int(sys.argv[1]), 600.0, time.monotonic()), {})
"""


@pytest.mark.parametrize("is_stopped_before", [True, False], ids=["before rank 1 comes", "while it waits"])
def test_a_first_rank_that_is_stopped_is_not_waited_for_for_ever(is_stopped_before, monkeypatch):
    monkeypatch.setattr(rendezvous, "_GRACE_S", 2.0)
    port = free_port()
    first = subprocess.Popen([sys.executable, "-c", FIRST_OF_THREE, str(port)])
    with ThreadPoolExecutor() as pool:
        try:
            until(lambda: not connects(port))
            root = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            root.wait(["alpro/0/0"])
            if is_stopped_before:
                first.send_signal(signal.SIGSTOP)
            waiting = pool.submit(meeting, port, {1: SAME}, num_ranks=3, timeout_s=4.0, run="a run")
            if not is_stopped_before:
                root.wait(["alpro/0/1"])
                first.send_signal(signal.SIGSTOP)
            error = waiting.result(timeout=20)[1]
        finally:  # Also what waits for it ends then.
            first.kill()
            first.wait()
    assert (type(error), error.fault) == (RankError, "hardware")
    assert "the first rank is stopped or cut off" in str(error) or "it does not answer: it is stopped" in str(error)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_address_that_is_not_that_of_the_first_rank(monkeypatch):
    """Of no machine, in a net that is for documents."""
    monkeypatch.setattr(rendezvous, "_GRACE_S", 1.0)
    port = free_port()
    start = time.monotonic()
    with pytest.raises(RankError, match=f"this is rank 0, but 192.0.2.1:{port} does not lead here, to "):
        meet(0, Meeting("a run", 2, "192.0.2.1", port, 60.0, time.monotonic()), SAME)
    assert time.monotonic() - start < 10


def test_two_machines_that_are_both_the_first(monkeypatch):
    """The second one listens on another port here, as it does on another machine."""
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meeting, port, {0: SAME, 1: SAME}, delays={1: 2.0}, run="a run")
        root = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        root.wait(["alpro/0/0"])
        opened = rendezvous.open_store

        def open_elsewhere(address, port, is_host, *seconds):
            return opened(address, free_port() if is_host else port, is_host, *seconds)

        monkeypatch.setattr(rendezvous, "open_store", open_elsewhere)
        with pytest.raises(RankError, match=r"does not lead here, to .* with --node-rank 0, and the only one"):
            meet(0, Meeting("a run", 2, "127.0.0.1", port, 60.0, time.monotonic()), SAME)
        stores = first.result(timeout=20)
    stores[0].set("key", "of the first")
    assert stores[1].get("key") == b"of the first"


def test_a_rank_that_gave_up_is_not_counted(monkeypatch):
    """Rank 1 began long before the first one, and its time is over before rank 2 comes."""
    monkeypatch.setattr(rendezvous, "_GRACE_S", 1.5)
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meeting, port, {0: SAME}, num_ranks=3, timeout_s=5.0)
        late = Meeting("the training in /a", 3, "127.0.0.1", port, 60.0, time.monotonic() - 59)
        with pytest.raises(RankError, match="in vain: only ranks 0-1 of 3 have come"):
            meet(1, late, SAME)
        last = pool.submit(meeting, port, {2: SAME}, num_ranks=3)
        said = "rank 1 of 3 did not come within 5 s; there are ranks 0, 2 on"
        assert str(first.result(timeout=20)[0]).startswith(said)
        assert str(last.result(timeout=20)[2]).startswith(said)


WITHOUT_PAGES = """
import os, sys
from alpro_launch import preflight, train
assert "torch" not in sys.modules
assert train.main(["no-such-file.yaml"]) == 78
print(os.environ["TORCH_CPP_LOG_LEVEL"])
"""


def test_torch_keeps_its_stacks_to_itself():
    """It reads that when it is imported."""
    command = [sys.executable, "-c", WITHOUT_PAGES]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "ERROR\n", done.stderr


def test_another_version_may_say_more_of_itself():
    said = asdict(Caller("node1", SAME, "a")) | {"colour": "red"}
    assert Caller.from_json(said) == Caller("node1", SAME, "a")


def test_a_machine_that_does_not_answer(monkeypatch):
    with pytest.raises(RankError, match=r"it cannot be reached from .*: is the address right\?"):
        meet(1, Meeting("a run", 2, "no-such-machine.invalid", 29500, 1.0, time.monotonic()), SAME)


def test_many_ranks_are_described_in_few_words():
    there = {rank: Caller(f"node{rank // 8}", SAME) for rank in range(16)}
    text = describe_absent(there, 32, 600)
    assert text.startswith("ranks 16-31 of 32 did not come within 600 s; there are ranks 0-15 on node0, node1.")
    callers = [*there.values()][:8] + [Caller("node1", SAME | {"torch": "2.12"})] * 8
    assert "torch 2.11 on node0 (ranks 0-7) and 2.12 on node1 (ranks 8-15)" in describe_differences(callers)
    assert describe_differences([*there.values()]) == ""
    missing = [Caller("a", {"torch": "1"}), Caller("b", {})]
    assert "torch 1 on a (rank 0) and none on b (rank 1)" in describe_differences(missing)


@pytest.mark.parametrize(("number", "state"), [(errno.EHOSTUNREACH, State.SILENT), (errno.ECONNREFUSED, State.GONE)])
def test_a_machine_off_the_network_is_not_taken_for_a_rank_that_has_ended(monkeypatch, number, state):
    def refuse(*_, **__):
        raise OSError(number, "as the system says it")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert ask(("10.0.0.9", 1), 0).state is state
