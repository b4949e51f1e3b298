"""The process-group helper, and what ranks tell each other."""

import os
import time
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from alpro_stream.errors import AlproError, DataError
from alpro_stream.testing.distributed import RankError, run_ranks
from alpro_stream.train import watchdog
from alpro_stream.train.distributed import World, _limit_groups, join_world

PRELOAD = ("alpro_stream.run",)


def everything_a_world_does():
    world = join_world(timeout_s=60)
    rows = torch.arange(3) + 10 * world.rank
    found = {
        "place": (world.rank, world.local_rank, world.size, world.is_first),
        "gather": world.gather(rows[:, None]).flatten().tolist(),
        "sum": world.sum(torch.tensor([1.0 + world.rank])).item(),
        "same": (world.all_same("x"), world.all_same(f"x{world.rank}")),
        "threads": torch.get_num_threads(),
    }
    for failing in ((), (1,), (0, 1)):
        try:
            with world.all_or_none():
                if world.rank in failing:
                    raise DataError(f"no clip on {world.rank}")
            found[failing] = "fine"
        except AlproError as error:
            found[failing] = (type(error).__name__, str(error))
    try:
        with world.all_or_none():
            assert world.rank == 1, "a bug"
    except Exception as error:
        found["bug"] = (type(error).__name__, str(error).splitlines()[0])
    found["first"] = world.from_first(lambda: {"made by": world.rank, "object": [None, 3.5]})
    try:
        world.from_first(lambda: _refuse(world.rank))
    except AlproError as error:
        found["nothing from first"] = (type(error).__name__, str(error))
    world.barrier()
    return found


def _refuse(rank):
    raise DataError(f"no listing on {rank}")


@pytest.fixture(scope="module")
def found():
    return run_ranks(everything_a_world_does, 2, preload=PRELOAD)


def test_ranks_are_in_order(found):
    assert [rank["place"] for rank in found] == [(0, 0, 2, True), (1, 1, 2, False)]
    for rank in found:
        assert rank["gather"] == [0, 1, 2, 10, 11, 12]
        assert rank["sum"] == 3.0
        assert rank["same"] == (True, False)
        assert rank["threads"] == 1


def test_all_succeed_or_all_raise(found):
    assert [rank[()] for rank in found] == ["fine", "fine"]
    assert found[0][1,] == ("OtherRankError", "rank 1 failed: no clip on 1")
    assert found[1][1,] == ("DataError", "no clip on 1")
    assert [rank[0, 1] for rank in found] == [("DataError", "no clip on 0"), ("DataError", "no clip on 1")]
    assert [rank["bug"] for rank in found] == [
        ("AssertionError", "a bug"),
        ("OtherRankError", "rank 0 failed: AssertionError: a bug"),
    ]


def test_what_the_first_rank_made_is_on_every_rank(found):
    assert [rank["first"] for rank in found] == [{"made by": 0, "object": [None, 3.5]}] * 2
    assert [rank["nothing from first"] for rank in found] == [
        ("DataError", "no listing on 0"),
        ("OtherRankError", "rank 0 failed: no listing on 0"),
    ]


def test_a_process_alone_is_a_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    world = join_world(timeout_s=10)
    assert (world.rank, world.size) == (0, 1)
    assert world.gather(torch.tensor([4])).tolist() == [4]
    assert world.from_first(lambda: "made") == "made"
    with pytest.raises(DataError, match="gone"), world.all_or_none():
        raise DataError("gone")


def wait_for_a_slow_rank():
    rank = dist.get_rank()
    dist.barrier()
    world = World(rank, rank, 2, torch.device("cpu"), dist.new_group(timeout=timedelta(seconds=1.5)), 1.5, "a.setting")
    found = []
    for stage in (slow_listing, mistake):
        try:
            stage(world)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def slow_listing(world):
    world.from_first(lambda: time.sleep(2.5), "the listing")


def mistake(world):
    """In a group that is broken by now."""
    with world.all_or_none("the decoders"):
        if world.is_first:
            raise DataError("no clip")


def test_a_rank_that_waits_in_vain_says_what_for():
    first, second = run_ranks(wait_for_a_slow_rank, 2, preload=PRELOAD)
    for rank, (kind, message) in ((0, first[0]), (1, second[0])):
        assert kind == "RankError"
        assert message.startswith(f"rank {rank} of 2 waited ")
        assert " s for rank 0 and the listing at the start, in vain: another rank was ended" in message
        assert "took longer than 1.5 s. If none of them says why, raise a.setting" in message
        assert "\n" not in message
    # Its own error says more than that the others are gone.
    assert first[1] == ("DataError", "no clip")
    assert "for the decoders at the question which rank is missing, in vain" in second[1][1]


def go_on_alone():
    world = join_world(timeout_s=60)
    if not world.is_first:
        return []
    found = []
    for ask in (
        lambda: world.gather(torch.ones(1)),
        lambda: world.sum(torch.ones(1)),
        lambda: world.all_same("x"),
        world.barrier,
    ):
        try:
            ask()
        except AlproError as error:
            found.append(str(error))
    return found


def test_every_collective_says_that_a_rank_is_gone():
    found, _ = run_ranks(go_on_alone, 2, preload=PRELOAD)
    assert len(found) == 4
    assert all(text.startswith("rank 0 of 2 waited ") for text in found)


def wait_in_groups_of_others(is_over):
    """As DeepSpeed does, which gives its groups no deadline."""
    world = join_world(timeout_s=2)
    groups = [None, dist.new_group([0, 1])]
    started, failed = time.monotonic(), []
    for group in groups if world.is_first else []:
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.ones(1), group=group)
        failed.append(time.monotonic() - started)
    if world.is_first:
        is_over.touch()
    wait_for(is_over)
    return failed


def wait_for(file):
    """Else the others would see that a rank has ended."""
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_every_group_has_the_deadline_of_the_run_whoever_makes_it(tmp_path):
    """Also the one that was there before, of which the deadline was 120 s."""
    (of_default, of_other), _ = run_ranks(wait_in_groups_of_others, 2, tmp_path / "over", preload=PRELOAD)
    assert 1.5 < of_default < 20
    assert 1.5 < of_other - of_default < 20


def test_nccl_comes_after_the_watchdog(monkeypatch):
    """It would end the process without the named error, which is there 15 s behind the deadline at the latest."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))
    _limit_groups(100)
    assert c10d._get_default_timeout("gloo") == timedelta(seconds=100)
    assert c10d._get_default_timeout("nccl") > timedelta(seconds=100 + watchdog._GRACE_S + watchdog._TICK_S)


def half_a_launcher():
    dist.destroy_process_group()
    del os.environ["LOCAL_RANK"]
    os.environ.pop("MASTER_ADDR", None)
    join_world(timeout_s=10)


def test_half_of_a_launchers_variables_is_refused():
    with pytest.raises(RankError, match=r"WORLD_SIZE is 2 but LOCAL_RANK, MASTER_ADDR is not set"):
        run_ranks(half_a_launcher, 2, preload=PRELOAD)


def process_id(scale):
    return os.getpid(), scale * torch.ones(2)


def fail_on_1(error):
    if dist.get_rank() == 1:
        raise ValueError(error)
    # Waits for a rank that is gone; the helper must not.
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=600))
    finally:
        time.sleep(600)  # What breaks for it is not to be told before the cause.


def die_on_0():
    if dist.get_rank() == 0:
        os._exit(7)
    time.sleep(600)


def sleep_on_1():
    if dist.get_rank() == 1:
        time.sleep(600)


def test_results_come_by_rank_from_processes_that_are_gone_afterwards():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    results = run_ranks(process_id, 2, 3.0)
    assert len({pid for pid, _ in results}) == 2
    assert all(torch.equal(tensor, torch.tensor([3.0, 3.0])) for _, tensor in results)
    assert not any(psutil.pid_exists(pid) for pid, _ in results)
    # The multiprocessing module's own resource tracker may stay.
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert all("resource_tracker" in " ".join(child.cmdline()) for child in left)


def test_a_rank_that_raises_dies_or_hangs_is_an_error_of_the_caller():
    with pytest.raises(RankError, match=r"(?s)rank 1 raised:.*in fail_on_1.*ValueError: something is wrong"):
        run_ranks(fail_on_1, 2, "something is wrong", preload=PRELOAD)
    with pytest.raises(RankError, match="rank 0 died with exit status 7"):
        run_ranks(die_on_0, 2, preload=PRELOAD)
    with pytest.raises(RankError, match="not done in time: rank 1 of 2"):
        run_ranks(sleep_on_1, 2, preload=PRELOAD, timeout_s=10)
    assert not [child for child in psutil.Process().children() if child.name().startswith("rank-")]
