"""The sharding command with real Ray, on the example clips and on damaged files."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shard_runs import (
    DEMO,
    ROOT,
    SHARD,
    contents,
    environment,
    processes_of,
    run_command,
    temporaries,
    wait_until_gone,
    write_manifest,
)

from alpro_sharding import ShardConfig, main, shard
from alpro_sharding.job import Progress
from alpro_stream.config import validate
from alpro_stream.errors import ShardError
from alpro_stream.exit_status import DATA
from alpro_stream.shards import ShardReader, load_dataset_info, load_entities


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The example clips, sharded by the command with two workers."""
    work_dir = tmp_path_factory.mktemp("demo")
    result = run_command(work_dir, DEMO, f"work_dir={work_dir}", "num_workers=2")
    assert result.returncode == 0, result.stderr
    wait_until_gone(work_dir)
    return work_dir / "shards", result.stdout


def test_the_example_clips_become_shards(demo):
    out, printed = demo
    info = load_dataset_info(out / "train")
    num_rows = len((ROOT / "examples/clips/manifest.jsonl").read_text().splitlines())
    assert info.num_samples == num_rows
    assert [shard.name for shard in info.shards] == ["video-000000", "video-000001", "video-000002", "image-000000"]
    assert (out / "failures.jsonl").read_text() == ""
    assert f"{num_rows} rows in, {num_rows} samples out" in printed
    words = [word for word, _ in load_entities(out / "train" / "entities.json")]
    assert "man" in words[:5]
    assert len(words) > 100
    assert (out / "tokenizer" / "tokenizer.json").is_file()


def test_every_sample_of_the_examples_can_be_read(demo):
    out, _ = demo
    shards = ShardReader(out / "train")
    for info in shards.info.shards:
        for slot in range(info.num_samples):
            metadata, members = shards.metadata(info.name, slot), shards.frame_members(info.name, slot)
            assert len(members) == len(metadata.frame_timestamps_s)
            assert 1 <= len(members) <= 64
            if metadata.source["duration_s"]:  # 3 frames a second
                assert len(members) <= 3 * metadata.source["duration_s"] + 1


def test_one_worker_gives_the_same_bytes_as_two(demo, tmp_path):
    out, _ = demo
    result = run_command(tmp_path, DEMO, f"work_dir={tmp_path}", "num_workers=1")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "shards") == contents(out)


def test_a_second_run_makes_nothing_and_starts_no_ray(demo, capsys, monkeypatch):
    out, _ = demo
    monkeypatch.chdir(ROOT)
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    monkeypatch.setenv("RAY_ADDRESS", "no-such-cluster:1")  # Ray would fail if it were started
    assert main([DEMO, f"work_dir={out.parent}"]) == 0
    assert "4 shards, 4 of them made before" in capsys.readouterr().out
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == times


def test_changed_options_are_refused(demo, capsys, monkeypatch):
    out, _ = demo
    monkeypatch.chdir(ROOT)
    assert main([DEMO, f"work_dir={out.parent}", "frames.fps=1"]) == DATA
    printed = capsys.readouterr().err
    assert "options.frames.fps: 3.0 != 1.0" in printed
    assert "another `out`" in printed


def test_bad_rows_are_listed_and_the_good_ones_sharded(tmp_path):
    examples = ROOT / "examples/clips"
    clip, picture = next((examples / "videos").glob("*.mkv")), next((examples / "images").glob("*.jpg"))
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.jpg").write_bytes(picture.read_bytes()[:2000])
    manifest = write_manifest(
        tmp_path / "manifest.jsonl",
        "not json",
        {"id": "good/1", "media": str(clip), "captions": ["a dog"], "split": "val"},
        {"id": "text", "media": "text.mp4", "captions": ["a dog"]},
        {"id": "silent", "media": str(clip)},
        {"id": "cut", "media": "cut.jpg", "captions": ["a cat"]},
        {"id": "good/1", "media": str(clip), "captions": ["again"]},
        {"id": "lost", "media": "lost.mp4", "captions": ["a dog"]},
        {"id": "[red]good[/]", "media": str(picture), "captions": ["a cat"]},
        {"id": "late", "media": str(clip), "captions": ["a dog"], "start_s": 1000},
        {"id": "own", "media": str(clip), "captions": ["a dog"], "split": "tokenizer"},
    )
    config = validate(ShardConfig, {"manifest": str(manifest), "out": str(tmp_path / "out"), "num_workers": 1}, "test")
    progress = []
    summary = shard(config, progress.append)
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [(f["line"], f["id"], f["stage"]) for f in failures] == [
        (1, None, "manifest"),
        (3, "text", "probe"),
        (4, "silent", "manifest"),
        (5, "cut", "decode"),
        (6, "good/1", "manifest"),
        (7, "lost", "probe"),
        (9, "late", "decode"),
        (10, "own", "manifest"),
    ]
    assert set(failures[1]) == {"manifest", "line", "id", "media", "stage", "reason"}
    assert (summary.num_rows, summary.num_samples, summary.num_failures) == (10, 2, 8)
    assert sorted(summary.splits) == ["train", "val"]
    assert progress[-1] == Progress(num_rows=10, num_done=10, num_new=6)
    assert load_entities(tmp_path / "out" / "val" / "entities.json") == [("dog", 1)]


def test_when_nothing_can_be_made_the_reasons_are_named(tmp_path, capsys):
    manifest = write_manifest(tmp_path / "manifest.jsonl", {"id": "a", "media": "a.mp4"}, "not json", "not json")
    config = validate(ShardConfig, {"manifest": str(manifest), "out": str(tmp_path / "out")}, "test")
    with pytest.raises(ShardError, match=r"no sample could be made .*3 rows; 2 x manifest: not JSON.*1 x manifest: no"):
        shard(config)
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "train").exists()
    assert (
        main([str(ROOT / "configs/shard/default.yaml"), f"manifest={tmp_path / 'none'}", f"work_dir={tmp_path}"])
        == DATA
    )
    assert "no such manifest" in capsys.readouterr().err


def start_slow_run(work_dir):
    """Starts the command on many small shards and waits until some are done."""
    arguments = [*SHARD, DEMO, f"work_dir={work_dir}", "samples_per_shard=1", "num_workers=2"]
    env = environment(work_dir)
    process = subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    results = work_dir / "shards" / ".ledger" / "train"
    while process.poll() is None and len(list(results.glob("*.json"))) < 5:
        time.sleep(0.05)
    assert process.poll() is None
    return process


@pytest.mark.slow
def test_killed_and_run_again_the_result_is_that_of_an_undisturbed_run(tmp_path):
    process = start_slow_run(tmp_path / "killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(tmp_path / "killed")
    assert not (tmp_path / "killed" / "shards" / "train" / "dataset.json").exists()
    again = run_command(tmp_path, DEMO, f"work_dir={tmp_path / 'killed'}", "samples_per_shard=1")
    assert again.returncode == 0, again.stderr
    assert "of them made before" in again.stdout
    straight = run_command(tmp_path, DEMO, f"work_dir={tmp_path / 'straight'}", "samples_per_shard=1")
    assert straight.returncode == 0, straight.stderr
    assert contents(tmp_path / "killed" / "shards") == contents(tmp_path / "straight" / "shards")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
def test_interrupted_it_ends_with_130_and_leaves_no_process(tmp_path):
    process = start_slow_run(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    wait_until_gone(tmp_path)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path):
    process = start_slow_run(tmp_path / "killed")
    workers = [
        child.pid
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ray::make_shard" in " ".join(child.cmdline())
    ]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert workers
    assert process.returncode == 0, errors
    assert load_dataset_info(tmp_path / "killed" / "shards" / "train").num_samples > 30


@pytest.fixture
def cluster(tmp_path):
    """A Ray cluster of one node, started as an operator does."""
    # A token of its own, so that nobody's real one is used.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray, env = str(Path(sys.executable).with_name("ray")), {**environment(tmp_path), **token}
    head = [ray, "start", "--head", "--port=6399", "--dashboard-port=8299", "--num-cpus=2", "--block"]
    process = subprocess.Popen(head, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield ray, "http://127.0.0.1:8299", env
    process.terminate()
    process.wait(timeout=60)
    wait_until_gone(tmp_path)


def submit(cluster, *arguments, options=()):
    """Submits a job from the checkout; a cluster that has just started refuses for some seconds."""
    ray, address, env = cluster
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", *options, "--"]
    for _ in range(60):
        result = subprocess.run(
            [*command, *SHARD, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
        )
        if "submitted successfully" in result.stdout:
            break
        time.sleep(1)
    return result


@pytest.mark.slow
def test_submitted_as_a_ray_job(cluster, demo, tmp_path):
    relative = submit(cluster, DEMO)
    assert relative.returncode != 0
    assert "give an absolute path that all nodes see" in relative.stdout
    result = submit(cluster, DEMO, f"work_dir={tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(tmp_path / "shards") == contents(demo[0])


def kill_driver(marker, notes, num_done):
    """kill -9 of the driver of a submitted job, as soon as so many shards are made."""
    for _ in range(2400):
        drivers = [pid for pid in processes_of(marker) if command_of(pid)[1:3] == ["-m", "sharding"]]
        if drivers and len(list(notes.glob("*.json"))) >= num_done:
            for pid in drivers:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)
    pytest.fail("the job did not come that far")


def command_of(pid):
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_submitted_job_whose_driver_is_killed_goes_on_when_it_is_submitted_again(cluster, demo, tmp_path):
    arguments = [DEMO, f"work_dir={tmp_path}", "samples_per_shard=1"]
    notes = tmp_path / "shards/.ledger/train"
    for num_done in (3, 12):
        assert submit(cluster, *arguments, options=["--no-wait"]).returncode == 0
        kill_driver(tmp_path, notes, num_done)
        assert not (tmp_path / "shards/train/dataset.json").exists()
    result = submit(cluster, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of them made before" in result.stdout
    quiet = run_command(tmp_path / "quiet", DEMO, f"work_dir={tmp_path / 'quiet'}", "samples_per_shard=1")
    assert quiet.returncode == 0, quiet.stderr
    assert contents(tmp_path / "shards") == contents(tmp_path / "quiet/shards")
    assert not temporaries(tmp_path / "shards")
