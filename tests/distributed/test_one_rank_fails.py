"""Something that goes wrong on one rank ends all of them with its message: none hangs, none exits with 0."""

import io
import json
import os
import signal
import threading
import time
from contextlib import redirect_stderr

import psutil
import pytest

from alpro_launch.train import main
from alpro_stream.config import save_config
from alpro_stream.run import RunConfig, train
from alpro_stream.shards import ShardReader
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.distributed import run_ranks

PRELOAD = ("alpro_stream.run",)


def write_config(corpus, run_dir, **changes):
    path = run_dir.with_suffix(".yaml")
    save_config(RunConfig.model_validate(tiny_run(corpus, run_dir, changes)), path)
    return path


def damage(corpus, key):
    """Overwrites the pictures of a sample."""
    directory = corpus / "train"
    reader = ShardReader(directory)
    for shard in reader.info.shards:
        for slot in range(shard.num_samples):
            if reader.metadata(shard.name, slot).key == key:
                with (directory / f"{shard.name}.tar").open("r+b") as file:
                    for member in reader.frame_members(shard.name, slot):
                        file.seek(member.offset)
                        file.write(b"\0" * member.size)
                return f"{shard.name}:{slot} {key}"
    raise AssertionError(key)


def train_as_a_command(config):
    """Exit status and standard error of `alpro_launch.train`, and the processes that it left."""
    error = io.StringIO()
    with redirect_stderr(error):
        status = main([str(config)])
    left = [child.pid for child in psutil.Process().children() if "tracker" not in " ".join(child.cmdline())]
    return status, error.getvalue(), left, [thread.name for thread in threading.enumerate()]


def test_too_many_damaged_samples_that_one_rank_reads(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    place = damage(corpus, "video-00011")
    # As many steps as need every sample of the source.
    changes = {
        "train.max_steps": 8,
        "stream.sources": [{"path": str(corpus / "train"), "kind": "video"}],
        "stream.quarantine.max_rate": 0,
    }
    config = write_config(corpus, tmp_path / "run", **changes)
    results = run_ranks(train_as_a_command, 2, config, preload=PRELOAD)
    named = ["error: 1 of the last " in error and place in error for _, error, _, _ in results]
    reported = ["failed: 1 of the last " in error and place in error for _, error, _, _ in results]
    assert sorted(named) == sorted(reported) == [False, True]
    assert named != reported
    for status, _, left, threads in results:
        assert status == 1
        assert left == []
        assert not {"alpro-reader", "alpro-decoder"} & set(threads)


def train_while_its_prompter_dies(config, run_dir, step):
    """On rank 1 the prompter is killed once the metrics have the step."""
    if os.environ["RANK"] == "1":
        threading.Thread(target=_kill_the_prompter, args=(run_dir, step), daemon=True).start()
    return train_as_a_command(config)


def _kill_the_prompter(run_dir, step):
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= step):
        time.sleep(0.005)
    for child in psutil.Process().children():
        if "spawn_main" in " ".join(child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_prompter_that_dies_beside_one_rank_ends_both(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    prompter = train(RunConfig.model_validate(tiny_run(corpus, tmp_path / "prompter", {"train.max_steps": 1})))
    run_dir = tmp_path / "run"
    changes = {"task": "pretrain", "prompter.checkpoint": str(prompter.checkpoint), "train.max_steps": 2000}
    config = write_config(corpus, run_dir, **changes)
    results = run_ranks(train_while_its_prompter_dies, 2, config, run_dir, 5, preload=PRELOAD, timeout_s=200)
    (first, second), lefts = [result[:2] for result in results], [result[2] for result in results]
    assert (first[0], second[0]) == (1, 1)
    assert "rank 1: error: the prompter of rank 1 (pid" in second[1]
    assert "rank 0: error: rank 1 failed: the prompter of rank 1 (pid" in first[1]
    for _, error in (first, second):
        assert "died with exit status -9 when" in error
        assert "start the run again, it goes on from its last checkpoint" in error
    assert lefts == [[], []]
    # And it does: from its last checkpoint to its end.
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 5 <= last < 2000
