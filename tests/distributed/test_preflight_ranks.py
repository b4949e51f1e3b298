"""`alpro preflight` on several ranks: what they find together, and what becomes of a check that one of them leaves."""

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import psutil
import pytest

from alpro_launch import preflight_run
from alpro_launch.local_ranks import free_port
from alpro_launch.preflight import main
from alpro_launch.preflight_checks import runner as runner_module
from alpro_launch.preflight_checks.clock import judge_offsets, measure_offset
from alpro_launch.preflight_checks.lines import first_fault
from alpro_launch.preflight_checks.links import judge_links, measure_links
from alpro_launch.preflight_checks.runner import Runner
from alpro_launch.preflight_checks.written import Written
from alpro_launch.preflight_run import Preflight
from alpro_stream.config import save_config
from alpro_stream.errors import RankError
from alpro_stream.exit_status import HARDWARE, PREEMPTED
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.distributed import join_world

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = ("alpro_launch.preflight_run",)
MARK = "ALPRO_TEST_STARTED_BY"
QUICK = {"stream.decode.workers": "threads", "train.engine.num_threads": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_config(path, corpus, run_dir, changes):
    save_config(RunConfig.model_validate(tiny_run(corpus, run_dir, changes)), path)
    return path


def test_as_a_command_on_two_ranks_with_a_prompter(corpus, tmp_path):
    run = tiny_run(corpus, tmp_path / "prompter", {"train.max_steps": 1})
    checkpoint = train(RunConfig.model_validate(run)).checkpoint
    changes = {"task": "pretrain", "prompter.checkpoint": str(checkpoint), "train.engine.num_threads": 1}
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "run", changes)
    report, cache = tmp_path / "found.json", tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "alpro_launch.cli",
        "preflight",
        str(config),
        "--ranks",
        "2",
        "--json",
        str(report),
    ]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    own = {MARK: str(tmp_path), "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache)}
    before = files(tmp_path / "prompter", corpus)
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "0 failures\n" in done.stdout
    lines = {line["check"]: line for line in json.loads(report.read_text())["lines"]}
    certain = ("versions", "clocks", "lanes", "data", "storage", "decoder", "prompter")
    assert {lines[check]["verdict"] for check in certain} == {"ok"}
    assert "GB/s bus bandwidth" in lines["sums in a node"]["found"]
    assert "2 ranks with 2 lanes each" in lines["lanes"]["found"]
    assert "prompter " in lines["memory"]["found"]
    assert "2 ranks on" in lines["memory"]["found"]
    assert not (tmp_path / "run").exists()
    assert not list(temporary.iterdir())
    assert not cache.exists()
    assert files(tmp_path / "prompter", corpus) == before
    assert not [p.pid for p in psutil.process_iter() if is_ours(p, tmp_path)]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "image_size"), [(32, 48), (512, 224)])
def test_the_memory_it_finds_is_what_a_run_takes(corpus, tmp_path, width, image_size):
    """Within a fifth, of the sum over all processes of two ranks at its highest."""
    sizes = {"model.video.width": width, "model.text.width": width, "model.video.image_size": image_size}
    of_both = {**sizes, "train.engine.num_threads": 1}
    run = tiny_run(corpus, tmp_path / "prompter", {**of_both, "train.max_steps": 1})
    checkpoint = train(RunConfig.model_validate(run)).checkpoint
    changes = {**of_both, "task": "pretrain", "prompter.checkpoint": str(checkpoint)}
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "run", changes)
    report = tmp_path / "found.json"
    command = [sys.executable, "-m", "alpro_launch.cli"]
    subprocess.run([*command, "preflight", config, "--ranks", "2", "--json", report], check=True, timeout=240)
    [found] = [line["found"] for line in json.loads(report.read_text())["lines"] if line["check"] == "memory"]
    with psutil.Popen([*command, "train", config, "--ranks", "2"]) as running:
        most = 0
        while running.poll() is None:
            most = max(most, sum(map(resident_bytes, [running, *running.children(recursive=True)])))
            time.sleep(0.1)
    assert running.returncode == 0
    assert float(found.partition(" GiB")[0]) == pytest.approx(most / 2**30, rel=0.2), found


def resident_bytes(process):
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def files(*folders):
    """All that is in them, with times and sizes: what was written again is seen."""
    states = {path: path.stat() for folder in folders for path in sorted(folder.rglob("*"))}
    return {path: (state.st_mtime_ns, state.st_size) for path, state in states.items()}


def is_ours(process, mark):
    try:
        return process.environ().get(MARK) == str(mark) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def look(corpus, run_dirs, changes, metadata=None):
    """Lines, as the ranks of a group find them.

    Args:
        run_dirs: of each rank.
        metadata: a folder with versions that the last rank finds first.
    """
    preflight_run._DECODE_S = 0.1
    world = join_world(60)
    if metadata and world.rank == world.size - 1:
        sys.path.insert(0, metadata)
    config = RunConfig.model_validate(tiny_run(corpus, run_dirs[world.rank], {**QUICK, **changes}))
    written = Written()
    with ExitStack() as stack:
        preflight = Preflight(config, world, 100, stack, written)
        preflight.run()
        preflight.wait_for_all()
    written.remove()
    return preflight.lines


def looked(corpus, run_dirs, changes=(), metadata=None):
    """The lines by their checks, on the first rank; all ranks judge alike."""
    lines, *others = run_ranks(look, len(run_dirs), corpus, run_dirs, dict(changes), metadata, preload=PRELOAD)
    judged = [(line.check, line.verdict) for line in lines]
    assert all([(line.check, line.verdict) for line in other] == judged for other in others)
    return {line.check: line for line in lines}


def test_three_ranks_for_sixteen_lanes(corpus, tmp_path):
    lines = looked(corpus, [tmp_path / "run"] * 3, {"stream.num_lanes": 16, "stream.global_batch": 32})
    assert first_fault(list(lines.values())) == "configuration"
    assert [check for check, line in lines.items() if line.verdict == "FAIL"] == ["lanes"]
    assert lines["lanes"].against == "16 lanes; allowed numbers of ranks: 1, 2, 4, 8, 16"
    unchecked = [check for check, line in lines.items() if line.found == "not checked"]
    assert unchecked == ["data", "storage", "decoder", "memory"]


def test_other_versions_and_another_run_dir_on_one_rank(corpus, tmp_path):
    info = tmp_path / "other/timm-99.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 99.1\n")
    lines = looked(corpus, [tmp_path / "run", tmp_path / "elsewhere"], metadata=str(info.parent))
    assert [check for check, line in lines.items() if line.verdict == "FAIL"] == ["versions", "run_dir"]
    assert lines["versions"].found.startswith("timm: ")
    assert ", 99.1 on " in lines["versions"].found
    assert "see another" in lines["run_dir"].found
    assert not (tmp_path / "run").exists()


def test_data_that_only_the_first_rank_cannot_open_fails_on_all_and_the_rest_goes_on(corpus, tmp_path):
    lines = looked(corpus, [tmp_path / "run"] * 2, {"stream.sources": [{"path": str(tmp_path / "nothing")}]})
    assert [check for check, line in lines.items() if line.verdict == "FAIL"] == ["data"]
    assert lines["data"].found.startswith("rank 0 on ")
    assert "(and 1 other rank)" in lines["data"].found
    assert lines["run_dir"].verdict == "ok"


def measure_as_two_machines():
    """What two ranks find that take each other for another machine, one with a clock that goes 5 s before."""
    world = join_world(60)
    offset = measure_offset(world, [0, 1], clock=lambda: time.time() + 5 * world.rank)
    return offset, measure_links(world, [[0], [1]], "127.0.0.1")


def test_clocks_and_links_between_machines():
    (first, links), (second, others) = run_ranks(measure_as_two_machines, 2, preload=PRELOAD)
    assert first is None
    assert second is not None
    assert abs(second.seconds - 5) <= second.uncertainty_s + 0.01
    assert second.uncertainty_s < 1
    assert judge_offsets([first, second], ["a", "b"])[0].verdict == "warn"
    assert (links.inside, others.inside) == (None, None)
    between, latency = judge_links([links, others], 2)
    assert between.check == "sums between nodes"
    assert "lo has no speed; copy in memory" in between.against
    assert latency.verdict == "ok"


def wait_for_one_that_stands_still(is_over):
    """What the first of two ranks says, and after how long."""
    runner_module._GRACE_S = 1.0
    world = join_world(60)
    runner = Runner(world, ["a", "b"], 100)
    started, said = time.monotonic(), ""
    if world.is_first:
        try:
            runner.run("disk", 1.0, lambda: None, lambda found: [])
        except RankError as error:
            said = str(error)
        is_over.touch()
    while not is_over.exists():  # There, and alive: else the first would see that it has ended.
        time.sleep(0.05)
    return said, time.monotonic() - started


def test_a_rank_that_stands_still_is_not_waited_for_longer_than_the_check(tmp_path):
    """Or the preflight would take minutes."""
    (said, seconds), _ = run_ranks(wait_for_one_that_stands_still, 2, tmp_path / "over", preload=PRELOAD)
    assert "for what all ranks found in the check of disk" in said
    # The seconds of the check, the grace, and the question which rank is missing.
    assert seconds < 2 + 8 + 20


def main_of_rank(pipe, rank, port, config, fault):
    """The entry of a rank; rank 1 does not come back from its reading of shards."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    if rank == 1:
        preflight_run.measure_reading = lambda *_: os.kill(os.getpid(), fault)
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        status = main([str(config), "train.timeout_s=30"])
    pipe.send((status, out.getvalue(), error.getvalue()))


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_in_mid_check_is_named(corpus, tmp_path, fault):
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "run", QUICK)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    port, (ours, theirs) = free_port(), context.Pipe(duplex=False)
    processes = [context.Process(target=main_of_rank, args=(theirs, rank, port, config, fault)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        assert ours.poll(40 if fault == signal.SIGKILL else 120), "the other rank hangs"
        status, printed, error = ours.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert status == HARDWARE
    assert "rank 0: error: rank 0 of 2 waited" in error
    assert "what all ranks found in the check of storage" in error
    said = "rank 1 has ended: it was killed" if fault == signal.SIGKILL else "rank 1 does not answer: it is stopped"
    assert said in error
    # What was found before is there.
    assert "versions" in printed
    assert "; ended before all checks were made" in printed
    assert "storage" not in printed
    assert not list(tmp_path.glob("**/.preflight-*"))


def test_asked_to_end_while_it_waits_for_another_host(tmp_path):
    config, port, report = ROOT / "configs/prompter/tiny.yaml", free_port(), tmp_path / "found.json"
    report.write_text("of another time")
    place = ["--nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, "-m", "alpro_launch.cli", "preflight", str(config), f"work_dir={tmp_path}/runs", *place]
    process = subprocess.Popen([*command, "--json", str(report)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not listens(port):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert said.splitlines()[-1] == "asked to stop before all checks were made"
    assert said.count("asked to stop") == 1
    assert not list(tmp_path.iterdir())


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_host_that_never_comes_is_named_within_two_minutes(tmp_path):
    """With a configuration as it is shipped; whatever is on the host that is there."""
    config = ROOT / "configs/prompter/tiny.yaml"
    place = ["--nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "alpro_launch.cli", "preflight", str(config), f"work_dir={tmp_path}/runs", *place]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 120
    assert done.returncode == HARDWARE, done.stderr
    assert "rank 0: error: rank 1 of 2 did not come" in done.stderr
    assert not list(tmp_path.iterdir())
