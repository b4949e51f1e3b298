"""How ranks find each other, with threads for ranks: who is missing, who runs something else, whose port it is."""

import errno
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from alpro_launch.local_ranks import free_port
from alpro_stream.errors import AlproError, ConfigError, OtherRankError, RankError
from alpro_stream.train.rendezvous import _HEARD, Caller, _wait_until_heard, describe_absent, describe_differences, meet
from alpro_stream.train.roll_call import State, ask

SAME = {"alpro-stream": "1.0", "torch": "2.11"}


def meeting(port, versions, num_ranks=None, timeout_s=20.0, delays=None):
    """What `meet` gives on each of these ranks."""

    def call(rank):
        time.sleep((delays or {}).get(rank, 0))
        try:
            return meet(rank, num_ranks or len(versions), "127.0.0.1", port, timeout_s, versions[rank])
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
    assert str(found[0]).startswith(
        "ranks 1, 3-4 of 5 did not come within train.timeout_s=1.5 s; there are ranks 0, 2 on"
    )
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
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in (0, 1):
        store.set(str(rank), "there")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(_wait_until_heard, store, 3)
        time.sleep(0.3)
        assert not waiting.done()
        store.add(_HEARD, 1)
        waiting.result(timeout=5)


def test_without_the_first_rank_nobody_listens():
    found = meeting(free_port(), {1: SAME}, num_ranks=2, timeout_s=1.0)[1]
    assert "rank 1 waited 1 s for the first rank at 127.0.0.1:" in str(found)
    assert "nobody listens there: the first rank was not started, or has ended" in str(found)
    assert found.fault == "hardware"


def test_a_port_that_another_program_has():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = meeting(port, {0: SAME, 1: SAME}, timeout_s=2.0)
    assert str(found[0]).startswith(f"port {port} of {socket.gethostname()}, on which the ranks meet, is taken")
    assert "--master_port of deepspeed" in str(found[0])
    assert found[0].fault == "configuration"
    assert "something listens there, but it is not the first rank of this run" in str(found[1])


def test_a_machine_that_does_not_answer(monkeypatch):
    with pytest.raises(RankError, match=r"it cannot be reached from .*: is the address right\?"):
        meet(1, 2, "no-such-machine.invalid", 29500, 1.0, SAME)


def test_many_ranks_are_described_in_few_words():
    there = {rank: Caller(f"node{rank // 8}", SAME) for rank in range(16)}
    text = describe_absent(there, 32, 600)
    assert text.startswith(
        "ranks 16-31 of 32 did not come within train.timeout_s=600 s; there are ranks 0-15 on node0, node1."
    )
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
