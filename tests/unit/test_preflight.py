"""What `alpro preflight` makes of what it measures, and of what is wrong with a run of one rank."""

import json
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from contextlib import suppress

import pytest
import torch
from object_server import FaultProxy, FileServer, running, silence

from alpro_launch import preflight_run
from alpro_launch.preflight import main
from alpro_launch.preflight_checks import disk
from alpro_launch.preflight_checks import runner as runner_module
from alpro_launch.preflight_checks.clock import Offset, judge_offsets
from alpro_launch.preflight_checks.disk import Disk, checkpoint_bytes, judge_disk
from alpro_launch.preflight_checks.lanes import judge_lanes
from alpro_launch.preflight_checks.lines import Line, first_fault, gib, verdict_of_share
from alpro_launch.preflight_checks.links import Links, bus_bandwidth, judge_links
from alpro_launch.preflight_checks.memory import Use, _limits_up, judge_gpus, judge_machines, machine_limit
from alpro_launch.preflight_checks.node import Node, judge_nodes, look_at_node
from alpro_launch.preflight_checks.places import Place, nodes_of
from alpro_launch.preflight_checks.runner import Failure, Runner, failed_line
from alpro_launch.preflight_checks.stream import Rate, judge_decoding, judge_reading, needed_clips_per_s
from alpro_launch.preflight_checks.versions import judge_versions
from alpro_launch.preflight_checks.written import Written
from alpro_launch.restart import allowed_ranks
from alpro_stream.config import save_config, validate
from alpro_stream.errors import AlproError
from alpro_stream.exit_status import CONFIGURATION, DATA, HARDWARE
from alpro_stream.run import RunConfig, train
from alpro_stream.shards import ShardReader
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import load_trained

HOSTS = ["a", "a", "b"]
NODES = [[0, 1], [2]]
GB = 10**9


def test_a_tenth_should_be_left():
    assert [verdict_of_share(share) for share in (0.9, 0.91, 1.0, 1.01)] == ["ok", "warn", "warn", "FAIL"]
    assert (gib(3.25 * 2**30), gib(40 * 2**20)) == ("3.2 GiB", "40 MiB")


def test_the_status_is_that_of_the_first_line_that_fails():
    bad = [Line("a", "", verdict="warn", fault="bug"), Line("b", "", verdict="FAIL", fault="hardware")]
    assert first_fault([*bad, Line("c", "", verdict="FAIL")]) == "hardware"
    assert first_fault(bad[:1]) is None


def test_ranks_share_a_machine_where_name_and_boot_are_the_same():
    places = [Place("localhost", "localhost 1"), Place("localhost", "localhost 2"), Place("localhost", "localhost 1")]
    assert nodes_of(places) == [[0, 2], [1]]


def test_lanes_are_refused_with_the_numbers_that_would_do():
    (line,) = judge_lanes(3, 16, 1)
    assert (line.verdict, line.fault, line.found) == ("FAIL", "configuration", "3 ranks")
    assert line.against == "16 lanes; allowed numbers of ranks: 1, 2, 4, 8, 16"
    assert line.remedy == "use 2 ranks, or for a new run set another stream.num_lanes"
    (line,) = judge_lanes(4, 16, 2)
    assert (line.verdict, line.found) == ("ok", "4 ranks with 4 lanes each in 2 micro-batches")


def test_micro_batches_leave_fewer_numbers_of_ranks():
    """Those with which a run would be started again, and no others."""
    (line,) = judge_lanes(8, 16, 4)
    assert line.against == "16 lanes in 4 micro-batches; allowed numbers of ranks: 1, 2, 4"
    assert line.remedy.startswith("use 4 ranks, or set train.engine.num_micro_batches to one of 1, 2, or for")
    (line,) = judge_lanes(4, 16, 3)
    assert line.against == "16 lanes in 3 micro-batches; allowed numbers of ranks: none"
    assert line.remedy.startswith("set train.engine.num_micro_batches to one of 1, 2, 4, or for")
    for size in range(1, 17):
        for parts in range(1, 17):
            (line,) = judge_lanes(size, 16, parts)
            assert (line.verdict == "ok") == (size in allowed_ranks(16, parts))


def test_versions_that_differ_are_named_with_their_hosts():
    same = {"torch": "2.11.0", "driver": "570.1", "DALI": "none"}
    (line,) = judge_versions([same] * 3, HOSTS)
    assert (line.verdict, line.found) == ("ok", "torch 2.11.0, driver 570.1")
    (line,) = judge_versions([same, same, {**same, "torch": "2.10.0"}], HOSTS)
    assert (line.verdict, line.found) == ("FAIL", "torch: 2.11.0 on a, 2.10.0 on b")
    (line,) = judge_versions([same, same, {**same, "driver": "571.0"}], HOSTS)
    assert (line.verdict, line.found) == ("warn", "driver: 570.1 on a, 571.0 on b")


def test_bus_bandwidth_is_that_of_nccl_tests():
    assert bus_bandwidth(GB, 1.0, 2) == 1.0
    assert bus_bandwidth(GB, 0.5, 4) == 3.0


def links(inside=None, between=None, speed=None, on_gpu=False):
    return Links(inside, between, 1e-4, 10.0, "eth0", speed, on_gpu)


@pytest.mark.parametrize(("found", "verdict"), [(0.63, "ok"), (0.62, "warn")])
def test_a_link_should_give_half_of_its_speed(found, verdict):
    lines = judge_links([links(between=found, speed=1.25), links(between=0.9, speed=1.25)], 2)
    assert [(line.check, line.verdict) for line in lines] == [("sums between nodes", verdict), ("latency", "ok")]
    assert f"{found:.2f} GB/s" in lines[0].found
    assert lines[0].against == "1.25 GB/s, speed of eth0"


def test_links_without_a_speed_are_compared_with_memory_or_not_at_all():
    inside, between, _ = judge_links([links(inside=0.3, between=0.1), links(between=0.25)], 2)
    assert (inside.verdict, inside.against) == ("ok", "10.00 GB/s, copy in memory")
    assert (between.verdict, between.against) == ("warn", "10.00 GB/s, eth0 has no speed; copy in memory")
    assert judge_links([links(inside=0.001, on_gpu=True)] * 2, 1)[0].against == "unknown between GPUs of a node"


def test_a_clock_is_wrong_only_beyond_what_the_way_there_may_explain():
    assert judge_offsets([None, None], HOSTS)[0].found == "one node"
    (line,) = judge_offsets([None, Offset(0.2, 0.01), Offset(-1.4, 0.5)], HOSTS)
    assert (line.verdict, line.found) == ("ok", "-1.400 s (+- 0.500) on b, the furthest")
    (line,) = judge_offsets([None, Offset(0.2, 0.01), Offset(-1.4, 0.3)], HOSTS)
    assert (line.verdict, line.fault, line.against) == ("warn", "hardware", "a, at most 1 s")


def test_what_a_run_takes_is_what_its_steps_take_without_waits_for_data():
    assert needed_clips_per_s([], 64) is None
    lines = [{"step_s": 9.0}, {"step_s": 4.0, "data_wait_percent": 50.0}, {"step_s": 2.0}, {"validation/vtc": 1.0}]
    assert needed_clips_per_s(lines, 64) == 32


def test_the_slowest_rank_decides_about_storage_and_decoder():
    found = [Rate(100, 10e6, 1.0), Rate(60, 20e6, 2.0)]  # 100 and 30 clips a second
    (line,) = judge_reading(found, 30.0, 2, False, 0.05)
    assert (line.verdict, line.found) == ("ok", "20.0 MB/s, 60 clips/s")
    assert line.against == "the run takes 30 clips/s; from step 2 on, dropped from the page cache before"
    (line,) = judge_reading(found, 30.1, 2, False, 0.05)
    assert (line.verdict, line.fault) == ("warn", "hardware")
    # What one has fetched serves the others too.
    (line,) = judge_reading(found, 65.0, 2, True, 0.05)
    assert (line.verdict, line.found) == ("ok", "20.0 MB/s, 130 clips/s")
    assert "not known" in judge_decoding(found, None, "dali-mixed", 0.05)[0].against
    assert judge_decoding([found[0], None], None, "dali-mixed", 0.05)[0].verdict == "warn"


@pytest.mark.parametrize(("num_bad", "verdict"), [(1, "warn"), (10, "warn"), (11, "FAIL")])
def test_more_unusable_samples_than_the_run_endures_fail(num_bad, verdict):
    (line,) = judge_decoding(
        [Rate(100, 0, 1.0), Rate(999, 0, 1.0, ("video-0:1 x: torn",), num_bad, 200)], None, "", 0.05
    )
    assert (line.verdict, line.fault) == (verdict, "data")
    assert f"{num_bad} samples are unusable: video-0:1 x: torn" in line.found


def test_the_ranks_of_a_machine_share_its_memory():
    uses = [Use(30, 10, 5, 100, "RAM"), Use(30, 10, 5, 95, "limit of the control group"), Use(80, 0, 0, 100, "RAM")]
    (line,) = judge_machines(uses, NODES, HOSTS)
    assert (line.verdict, line.against) == ("warn", "0 MiB, limit of the control group")
    assert "2 ranks on a" in line.found
    assert judge_machines(uses, [[0], [1], [2]], HOSTS)[0].verdict == "ok"
    (line,) = judge_machines([*uses[:2], Use(101, 0, 0, 100, "RAM")], NODES, HOSTS)
    assert line.verdict == "FAIL"
    assert "on b" in line.found
    assert judge_gpus([None, None], HOSTS) == []
    (line,) = judge_gpus([Use(50, 20, 10, 100, "H100", 5), Use(50, 20, 20, 100, "H100", 5)], HOSTS)
    assert (line.check, line.verdict) == ("GPU memory", "warn")
    assert "of rank 1 on a" in line.found


def test_the_limits_of_all_control_groups_around_a_process_count(tmp_path):
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "memory.max").write_text("900\n")
    (tmp_path / "job/memory.max").write_text("500\n")
    (tmp_path / "job/step/memory.max").write_text("max\n")
    assert [limit for limit, _ in _limits_up(tmp_path, "/job/step", "memory.max")] == [500, 900]
    assert machine_limit()[0] > 0


def test_a_checkpoint_more_than_is_kept_must_fit():
    def verdict(free, num_there=0, size=100):
        (line,) = judge_disk([Disk(free, True, num_there, size)] * 3, HOSTS, "run", 2)
        return line.verdict, line.fault

    assert verdict(300) == ("warn", "hardware")
    assert verdict(299) == ("FAIL", "hardware")
    assert verdict(334)[0] == "ok"
    # Those that are there will be removed when newer ones are.
    assert verdict(112, num_there=7)[0] == "ok"
    assert verdict(99, num_there=7)[0] == "FAIL"
    assert verdict(1, size=None)[0] == "ok"
    (line,) = judge_disk([Disk(300, True), Disk(300, True), Disk(300, False)], HOSTS, "run", 2)
    assert (line.verdict, line.fault, line.found) == ("FAIL", "configuration", "b see another run than a")


def test_what_a_machine_gives_is_shared_by_its_ranks():
    def verdicts(nodes, **needs):
        needs = {"shm_bytes": 10, "num_files": 128, "num_workers": 2, **needs}
        found = [Node(64, 1024, 6.0), Node(64, 1024, 6.0), Node(64, 1024, 3.0)]
        return [line.verdict for line in judge_nodes(found, nodes, HOSTS, **needs)]

    assert verdicts(NODES) == ["ok", "ok", "ok"]
    assert verdicts(NODES, shm_bytes=33) == ["FAIL", "ok", "ok"]
    assert verdicts([[0], [1], [2]], shm_bytes=33) == ["ok", "ok", "ok"]
    assert verdicts(NODES, num_files=1000) == ["ok", "warn", "ok"]
    assert verdicts(NODES, num_files=1025) == ["ok", "FAIL", "ok"]
    assert verdicts(NODES, num_workers=3) == ["ok", "ok", "warn"]
    assert look_at_node().num_cores > 0


def test_of_several_failures_the_cause_is_told():
    failures = {
        0: Failure("rank 2 failed: no shard", "data"),
        1: Failure("not done after 9 s", "hardware", is_late=True),
        2: Failure("no shard", "data"),
    }
    line = failed_line("data", failures, HOSTS, "FAIL")
    assert (line.verdict, line.fault, line.found) == ("FAIL", "data", "rank 2 on b: no shard (and 2 other ranks)")
    assert failed_line("memory", {1: failures[1]}, HOSTS, "warn").verdict == "warn"


def test_a_check_that_hangs_or_breaks_is_a_line_and_the_next_one_is_made(capsys):
    world = World(0, 0, 1, torch.device("cpu"))
    runner = Runner(world, ["a"], 100)

    def found(values):
        return [Line("next", str(values))]

    assert not runner.run("disk", 0.1, lambda: threading.Event().wait(), found)
    assert not runner.run("sums", 0.1, lambda: threading.Event().wait(), found, together=True)
    assert not runner.run("more sums", 9, lambda: 1, found, together=True)
    assert not runner.run("bug", 9, lambda: 1 // 0, found)
    assert runner.run("next", 9, lambda: 7, found)
    assert [(line.found, line.verdict) for line in runner.lines] == [
        ("not done after 0 s", "FAIL"),
        ("not done after 0 s", "FAIL"),
        ("not checked", "warn"),
        ("ZeroDivisionError: integer division or modulo by zero", "FAIL"),
        ("[7]", "ok"),
    ]
    assert runner.lines[2].against == "the ranks are out of step since the check of sums"
    assert [line.fault for line in runner.lines[:4]] == ["hardware", "hardware", "configuration", "bug"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    late = Runner(world, ["a"], 0)
    assert not late.run("next", 9, lambda: 7, found)
    assert late.lines[0].against == "the 0 s of a preflight were over"
    has_waited = Runner(world, ["a"], 100, time.monotonic() - 101)
    assert has_waited.run("first", 9, lambda: 7, found)
    assert not has_waited.run("next", 9, lambda: 7, found)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train_a_step(corpus, run_dir, changes):
    return train(validate(RunConfig, tiny_run(corpus, run_dir, changes), source="test")).checkpoint


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_is_as_large_as_is_said(corpus, tmp_path, stage):
    changes = {"train.max_steps": 1, "train.engine.zero_stage": stage, "model.video.width": 96, "model.text.width": 96}
    # In a process of its own: ZeRO 3 leaves traces in torch, which other tests would find.
    (checkpoint,) = run_ranks(train_a_step, 1, corpus, tmp_path, changes, preload=("alpro_stream.run",))
    model = load_trained(checkpoint, torch.device("cpu")).model
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert checkpoint_bytes(sum(p.numel() for p in model.parameters()), stage) == pytest.approx(size, rel=0.03)


@pytest.fixture
def preflight(corpus, tmp_path, monkeypatch, capsys):
    """Runs the entry of a rank; exit status, lines by their checks, and what was printed."""
    monkeypatch.setattr(preflight_run, "_DECODE_S", 0.1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)

    def preflight(changes=None, data=corpus):
        changes = {"stream.decode.workers": "threads", **(changes or {})}
        run_dir = changes.pop("run_dir", tmp_path / "run")
        config, report = tmp_path / "run.yaml", tmp_path / "found.json"
        save_config(validate(RunConfig, tiny_run(data, run_dir, changes), source="test"), config)
        status = main([str(config), "--json", str(report)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        lines = {line["check"]: line for line in json.loads(report.read_text())["lines"]}
        assert all(check.split()[0] in printed.out for check in lines)
        return status, lines

    yield preflight
    signal.signal(signal.SIGTERM, before)


def only_failing(lines):
    return [check for check, line in lines.items() if line["verdict"] == "FAIL"]


def test_a_run_that_can_start(preflight, tmp_path):
    status, lines = preflight()
    assert status == 0
    checks = ["versions", "clocks", "lanes", "data", "storage", "decoder", "memory", "run_dir", "shared memory"]
    assert list(lines) == [*checks, "open files", "cores"]
    # What depends on the machine may be a warning.
    certain = ("versions", "clocks", "lanes", "data", "storage", "decoder")
    assert {lines[check]["verdict"] for check in certain} == {"ok"}
    assert "video: 24 samples, 3 steps a pass, 0 left over" in lines["data"]["found"]
    assert "an epoch is 4 steps, 32 samples" in lines["data"]["found"]
    assert "libjpeg-turbo-cpu: " in lines["decoder"]["found"]
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("**/.preflight-*"))


def test_metrics_of_the_run_say_what_it_takes(preflight, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "step_s": 1e-6}\n')
    status, lines = preflight()
    assert status == 0
    for check in ("storage", "decoder"):
        assert lines[check]["verdict"] == "warn"
        assert lines[check]["against"].startswith("the run takes 8000000 clips/s")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_shard_that_is_missing_or_cut_short(preflight, corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    gone, cut = data / "train/video-000001.tar", data / "train/video-000003.tar"
    gone.unlink()
    os.truncate(cut, 5000)
    status, lines = preflight(data=data)
    assert status == DATA
    assert lines["data"]["verdict"] == lines["storage"]["verdict"] == "FAIL"
    assert lines["data"]["found"].startswith(f"2 shards are wrong: {gone}: No such file or directory (on ")
    assert f"{cut}: 5000 bytes, dataset.json says" in lines["data"]["found"]
    assert "cannot read video-000001.tar" in lines["storage"]["found"]
    assert lines["decoder"]["found"] == "not checked"


def damage(data, num_shards):
    """Overwrites the pictures of some shards."""
    reader = ShardReader(data / "train")
    for shard in reader.info.shards[:num_shards]:
        with (data / f"train/{shard.name}.tar").open("r+b") as file:
            for slot in range(shard.num_samples):
                for member in reader.frame_members(shard.name, slot):
                    file.seek(member.offset)
                    file.write(b"\0" * member.size)


def test_damaged_samples(preflight, corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    damage(data, 2)
    status, lines = preflight(data=data)
    assert status == DATA
    assert only_failing(lines) == ["decoder"]
    assert "samples are unusable: video-00000" in lines["decoder"]["found"]
    status, lines = preflight({"stream.quarantine.max_rate": 1.0}, data=data)
    assert (status, lines["decoder"]["verdict"]) == (0, "warn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to decode on")
def test_a_decoder_that_cannot_be_made(preflight):
    status, lines = preflight({"stream.decode.device": "mixed"})
    assert status == CONFIGURATION
    assert only_failing(lines) == ["decoder"]
    assert "stream.decode.device is mixed, but no GPU was found here" in lines["decoder"]["found"]
    assert lines["storage"]["found"] == "not checked"


def test_a_run_dir_that_cannot_be_written(preflight, tmp_path):
    (tmp_path / "file").write_text("")
    status, lines = preflight({"run_dir": tmp_path / "file/run"})
    assert status == CONFIGURATION
    assert only_failing(lines) == ["run_dir"]
    assert "Not a directory" in lines["run_dir"]["found"]


def test_too_little_disk(preflight, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(0, 0, 10**6))
    status, lines = preflight()
    assert status == HARDWARE
    assert only_failing(lines) == ["run_dir"]
    assert "make room" in lines["run_dir"]["remedy"]


def test_a_prompter_that_is_missing(preflight, tmp_path):
    status, lines = preflight({"task": "pretrain", "prompter.checkpoint": str(tmp_path / "nothing")})
    assert status == CONFIGURATION
    assert only_failing(lines) == ["prompter"]
    assert lines["prompter"]["found"].startswith(f"{tmp_path / 'nothing'} does not exist; give an exported model")


def test_a_prompter_in_the_trainer_itself_and_one_that_does_not_fit(preflight, corpus, tmp_path):
    run = validate(RunConfig, tiny_run(corpus, tmp_path / "prompter", {"train.max_steps": 1}), source="test")
    changes = {"task": "pretrain", "prompter.checkpoint": str(train(run).checkpoint), "prompter.placement": "inline"}
    status, lines = preflight(changes)
    assert (status, lines["prompter"]["verdict"]) == (0, "ok")
    status, lines = preflight({**changes, "model.video.num_frames": 4})
    assert status == CONFIGURATION
    assert "was trained with num_frames 2, this run has 4" in lines["prompter"]["found"]


def test_a_data_set_or_tokenizer_that_is_not_there(preflight, tmp_path):
    status, lines = preflight({"stream.sources": [{"path": str(tmp_path / "nothing")}]})
    assert status == DATA
    assert only_failing(lines) == ["data"]
    assert str(tmp_path / "nothing") in lines["data"]["found"]
    status, lines = preflight({"stream.text.tokenizer": str(tmp_path / "nothing")})
    assert status == CONFIGURATION
    assert only_failing(lines) == ["data"]


def test_shards_behind_an_address_are_fetched_through_a_cache_of_its_own(preflight, corpus, tmp_path):
    files = {f"/train/{path.name}": path.read_bytes() for path in (corpus / "train").iterdir()}
    cache = {"stream.cache.folder": str(tmp_path / "cache/shards")}
    with running(FileServer(files)) as server:
        sources = {"stream.sources": [{"path": f"{server.address}/train", "kind": "video"}]}
        status, lines = preflight({**sources, **cache})
        assert status == 0
        assert lines["storage"]["verdict"] == lines["decoder"]["verdict"] == "ok"
        assert "through an empty cache" in lines["storage"]["against"]
        assert {path for path, _ in server.requests} >= {path for path in files if path.endswith(".tar")} - {
            "/train/image-000000.tar"
        }
        assert not (tmp_path / "cache").exists()
        del server.files["/train/video-000001.tar"]
        status, lines = preflight({**sources, **cache})
        assert status == DATA
        assert only_failing(lines) == ["storage"]
        assert "/train/video-000001.tar: missing" in lines["storage"]["found"]


def test_a_server_too_slow_for_a_batch_is_no_failure(preflight, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_run, "_READ_S", 0.5)
    files = {f"/train/{path.name}": path.read_bytes() for path in (corpus / "train").iterdir()}
    with running(FileServer(files)) as server, running(FaultProxy(server.server_port)) as proxy:
        proxy.faults = [silence(0), *[silence(20)] * 50]  # dataset.json comes, nothing else does
        changes = {"stream.sources": [{"path": f"{proxy.address}/train", "kind": "video"}]}
        status, lines = preflight({**changes, "stream.cache.folder": str(tmp_path / "cache/shards")})
    assert status == 0
    assert "0 clips/s" in lines["storage"]["found"]
    assert (lines["decoder"]["found"], lines["decoder"]["verdict"]) == ("not checked", "warn")
    assert not (tmp_path / "cache").exists()


def test_a_check_that_comes_late_makes_no_folder_again(preflight, corpus, tmp_path, monkeypatch):
    """Its thread is left behind, and goes on after all was removed."""
    is_over, has_read = threading.Event(), threading.Event()

    def read_late(maker, plan, steps, lanes, seconds):
        is_over.wait()
        with suppress(AlproError):
            maker.read(plan, steps[0], lanes)
        has_read.set()
        return Rate(0, 0, 1.0), []

    monkeypatch.setattr(preflight_run, "measure_reading", read_late)
    within = runner_module._within
    monkeypatch.setattr(
        runner_module,
        "_within",
        lambda seconds, measure, device: within(
            1.0 if getattr(measure, "__name__", "") == "_read" else seconds, measure, device
        ),
    )
    files = {f"/train/{path.name}": path.read_bytes() for path in (corpus / "train").iterdir()}
    with running(FileServer(files)) as server:
        changes = {"stream.sources": [{"path": f"{server.address}/train", "kind": "video"}]}
        try:
            status, lines = preflight({**changes, "stream.cache.folder": str(tmp_path / "new/cache/shards")})
        finally:
            is_over.set()
        assert has_read.wait(60)
    assert status == HARDWARE
    assert lines["storage"]["found"].startswith("not done after ")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "run").exists()


def test_nothing_that_was_written_stays_and_nothing_else_goes(tmp_path):
    written = Written()
    (tmp_path / "there").mkdir()
    places = [tmp_path / "a/b/folder", tmp_path / "a/c/file", tmp_path / "there/file", tmp_path / "never/file"]
    for place in places:
        written.add(place)
    (places[0] / "inside").mkdir(parents=True)
    for place in (places[0] / "inside/file", places[1], places[2], tmp_path / "there/of another"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")
    written.remove()
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "of another"]
