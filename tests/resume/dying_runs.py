"""Training in processes that die at a chosen point."""

import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

import alpro_stream.model.folder
import alpro_stream.run
import alpro_stream.train.checkpoint
import alpro_stream.train.trainer
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run
from alpro_stream.train.checkpoint import latest_checkpoint
from alpro_stream.train.metrics import MetricsWriter, read_metrics

TIMING = ("time", "step_s", "clips_per_s", "data_wait_percent", "prompter_wait_percent", "tflops", "mfu_percent")


def config(corpus, run_dir, **changes):
    """A run with one thread, so that sums are made in one order in every process."""
    tree = tiny_run(corpus, run_dir, {"train.engine.num_threads": 1, **changes})
    return RunConfig.model_validate(tree)


def metrics_of(run_dir):
    """Everything in the metrics that does not depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in TIMING and not key.startswith("stream/")}
        for line in read_metrics(run_dir)
    ]


def weights_of(run_dir):
    return load_file(latest_checkpoint(run_dir) / WEIGHTS_FILE)


def assert_same_run(found: Path, expected: Path):
    """Bit for bit: every line of metrics, every weight."""
    assert metrics_of(found) == metrics_of(expected)
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(step):
    """Death after the update of a step, when its line is written and nothing of it is saved."""
    write = MetricsWriter.write

    def write_and_die(self, at, values):
        write(self, at, values)
        if at == step:
            die()

    MetricsWriter.write = write_and_die


def wait_at_step(step, told):
    """Never goes on after the update of a step, and says so by making a file."""
    write = MetricsWriter.write

    def write_and_wait(self, at, values):
        write(self, at, values)
        if at == step:
            told.touch()
            time.sleep(600)

    MetricsWriter.write = write_and_wait


def die_while_saving(point, step):
    """Death at a point of the save of a step."""
    publish = alpro_stream.train.trainer.publish

    def publish_and_die(run_dir, at, *rest):
        if at == step:
            POINTS[point]()
        return publish(run_dir, at, *rest)

    alpro_stream.train.trainer.publish = publish_and_die


def _replace(owner, name, function):
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: function(original, *args, **kwargs))


def _before_anything_is_written():
    _replace(alpro_stream.run.Engine, "save", lambda *_: die())


def _after_the_engine_state():
    _replace(alpro_stream.model.folder, "save_weights", lambda *_, **__: die())


def _in_the_middle_of_the_weights():
    def save_half(save_weights, tensors, path):
        save_weights(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        die()

    _replace(alpro_stream.model.folder, "save_weights", save_half)


def _before_the_rename():
    _replace(alpro_stream.train.checkpoint, "_flush", lambda *_: die())


def _between_the_rename_and_the_mark():
    def rename(original, self, target):
        original(self, target)
        if "step-" in str(target):
            die()

    _replace(Path, "rename", rename)


def _between_the_mark_and_the_removal():
    _replace(alpro_stream.train.checkpoint, "_remove_old", lambda *_: die())


def _in_the_middle_of_the_removal():
    def remove_half(original, path, **options):
        if path.name.startswith("step-"):
            next(path.rglob("model.safetensors")).unlink()
            die()
        original(path, **options)

    _replace(alpro_stream.train.checkpoint.shutil, "rmtree", remove_half)


POINTS = {
    "before anything is written": _before_anything_is_written,
    "after the engine's state": _after_the_engine_state,
    "in the middle of the weights": _in_the_middle_of_the_weights,
    "before the rename": _before_the_rename,
    "between the rename and the mark": _between_the_rename_and_the_mark,
    "between the mark and the removal": _between_the_mark_and_the_removal,
    "in the middle of the removal": _in_the_middle_of_the_removal,
}


def _train_and_die(arm, arguments, run):
    arm(*arguments)
    train(run)


@contextmanager
def training(run, arm, *arguments):
    """A process that trains, armed; it is killed at the end of the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alpro_stream.run"])
    process = context.Process(target=_train_and_die, args=(arm, arguments, run))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def train_until_death(run, arm, *arguments):
    """Trains in another process until it dies as armed; returns its exit status."""
    with training(run, arm, *arguments) as process:
        process.join(120)
    return process.exitcode
