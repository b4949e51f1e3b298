"""The sharding command with real Ray, on the example clips and on damaged files."""

import contextlib
import hashlib
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

from alpro_sharding import ShardConfig, main, shard
from alpro_stream.config import validate
from alpro_stream.errors import ShardError
from alpro_stream.shards import ShardReader, load_dataset_info, load_entities

ROOT = Path(__file__).resolve().parents[2]
DEMO = "configs/demo/shard.yaml"
SHARD = [sys.executable, "-m", "sharding"]
MARK = "ALPRO_TEST_STARTED_BY"


def environment(marker):
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", MARK: str(marker)}


def run_command(marker, *arguments):
    command = [*SHARD, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(marker), capture_output=True, text=True, timeout=240)


def contents(out):
    """Digest of every file of a shard set that must not depend on how it was made."""
    paths = [path for path in out.rglob("*") if path.is_file() and ".ledger" not in path.parts]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name != "shard_config.yaml"  # names the folder
    }


def processes_of(marker):
    """Processes started, directly or not, with this mark in their environment; zombies have none."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == marker:
                found.add(process.pid)
    return found


def write_manifest(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The example clips, sharded by the command with two workers."""
    work_dir = tmp_path_factory.mktemp("demo")
    result = run_command(work_dir, DEMO, f"work_dir={work_dir}", "num_workers=2")
    assert result.returncode == 0, result.stderr
    assert processes_of(str(work_dir)) == set(), "the command left processes behind"
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
    assert main([DEMO, f"work_dir={out.parent}", "fps=1"]) == 1
    printed = capsys.readouterr().err
    assert "fps: 3.0 != 1.0" in printed
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
    summary = shard(config, lambda done, total: progress.append((done, total)))
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
    assert set(failures[1]) == {"line", "id", "media", "stage", "reason"}
    assert (summary.num_rows, summary.num_samples, summary.num_failures) == (10, 2, 8)
    assert sorted(summary.splits) == ["train", "val"]
    assert progress[-1] == (10, 10)
    assert load_entities(tmp_path / "out" / "val" / "entities.json") == [("dog", 1)]


def test_when_nothing_can_be_made_the_reasons_are_named(tmp_path, capsys):
    manifest = write_manifest(tmp_path / "manifest.jsonl", {"id": "a", "media": "a.mp4"}, "not json", "not json")
    config = validate(ShardConfig, {"manifest": str(manifest), "out": str(tmp_path / "out")}, "test")
    with pytest.raises(ShardError, match=r"no sample could be made .*3 rows; 2 x manifest: not JSON.*1 x manifest: no"):
        shard(config)
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "train").exists()
    assert (
        main([str(ROOT / "configs/shard/default.yaml"), f"manifest={tmp_path / 'none'}", f"work_dir={tmp_path}"]) == 1
    )
    assert "cannot read the manifest" in capsys.readouterr().err


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


def wait_until_gone(marker):
    for _ in range(120):
        if not processes_of(str(marker)):
            return
        time.sleep(0.5)
    pytest.fail("processes stayed behind")


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


def submit(cluster, *arguments):
    """Submits a job from the checkout; a cluster that has just started refuses for some seconds."""
    ray, address, env = cluster
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--"]
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
