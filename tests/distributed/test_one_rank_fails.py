"""Something that goes wrong on one rank ends all of them with its message: none hangs, none exits with 0."""

import io
import threading
from contextlib import redirect_stderr

import psutil

from alpro_launch.train import main
from alpro_stream.config import save_config
from alpro_stream.exit_status import DATA
from alpro_stream.run import RunConfig
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
        assert status == DATA
        assert left == []
        assert not {"alpro-reader", "alpro-decoder"} & set(threads)
