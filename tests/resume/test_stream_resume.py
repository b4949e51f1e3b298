"""A stream that was interrupted gives what one gives that was not: every key, pixel, token and draw of every step.

In real processes that die by SIGKILL, with other numbers of threads and ranks from one sitting to the next.
"""

import logging
import shutil
import signal
from collections import Counter

import pytest
import torch.distributed as dist
from dying_runs import assert_same_run, config, die_at_step, metrics_of, train_until_death, weights_of
from stream_log import (
    NUM_LANES,
    POINTS,
    SAVE_EVERY,
    Run,
    arm_stream,
    log_steps,
    read_entries,
    seeded,
    undisturbed,
)

from alpro_stream.errors import AlproError, CheckpointError, ConfigError
from alpro_stream.run import train
from alpro_stream.shards.index import ShardIndex
from alpro_stream.shards.layout import load_dataset_info
from alpro_stream.testing.configs import write_corpus
from alpro_stream.testing.distributed import RankError, run_ranks
from alpro_stream.testing.shards import write_dataset, write_tokenizer
from alpro_stream.train.checkpoint import complete_checkpoints, latest_checkpoint, read_state
from alpro_stream.train.trainer import Trainer

PRELOAD = ("alpro_stream.run", "stream_log")
# Four passes through videos of two steps each, and through images of one.
LAST_STEP = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Videos and images with something left over; one video of which no frame can be decoded."""
    root = tmp_path_factory.mktemp("stream")
    write_dataset(root / "train", video_shards=[5, 7, 1, 6], image_shards=[4, 6])
    write_tokenizer(root / "tokenizer")
    index = ShardIndex.load(root / "train" / "video-000001.idx")
    with (root / "train" / "video-000001.tar").open("r+b") as tar:
        for member in index.frame_members(3):
            tar.seek(member.offset + member.size // 2)
            tar.write(bytes(member.size - member.size // 2))
    return root


@pytest.fixture(scope="module")
def expected(root):
    return undisturbed(root, LAST_STEP)


def check(run, expected):
    assert run.entries() == expected
    for place, entry in run.everything():
        assert entry == expected[place], "made again, and not the same"


def test_the_undisturbed_stream_is_worth_comparing(root, expected):
    """All lanes of all steps; in a pass no sample comes twice, and in another one it is seen differently."""
    assert expected.keys() == {(step, lane) for step in range(LAST_STEP) for lane in range(NUM_LANES)}
    passes = [[key for step in range(f, f + 3) for lane in range(4) for key in expected[step, lane][0]] for f in (0, 3)]
    assert all(len(keys) == len(set(keys)) == 24 for keys in passes)
    assert Counter(key.split("-")[0] for key in passes[0]) == {"video": 16, "image": 8}
    assert "video-00008" not in {key for keys, _ in expected.values() for key in keys}
    assert len({digest for _, digest in expected.values()}) == len(expected)


def test_killed_once_at_each_point_with_another_number_of_threads_each_time(root, expected, tmp_path):
    draw = seeded()
    run = Run(root, tmp_path, LAST_STEP)
    # The second save is the first after a step.
    calls = {"step": draw.randint(3, 5), "reader": draw.randint(1, 30), "decoder": draw.randint(1, 5), "save": 2}
    for point, num_workers in zip(POINTS, (1, 4, 0, 1), strict=True):
        run.changes = {"decode": {"num_workers": num_workers}}
        assert not run.sit(1, {0: (point, calls[point])})
    run.changes = {"decode": {"num_workers": 4}}
    assert run.sit(1)
    check(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("point", POINTS)
def test_killed_three_times_at_a_random_moment(root, expected, tmp_path, point, num_workers):
    """The last sitting has another number of threads."""
    draw = seeded()
    run = Run(root, tmp_path, LAST_STEP, {"decode": {"num_workers": num_workers}})
    per_step = {"reader": 8, "decoder": 1, "step": 1, "save": 0.5}[point]
    for _ in range(3):
        left = max(1, int((LAST_STEP - run.cursor().step) * per_step))
        assert not run.sit(1, {0: (point, draw.randint(1, max(1, left // 2)))})
        print(f"committed {run.cursor().step}")
    run.changes = {"decode": {"num_workers": draw.choice([0, 1, 4])}}
    assert run.sit(1)
    check(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_killed_from_outside(root, expected, tmp_path, num_workers):
    draw = seeded()
    run = Run(root, tmp_path, LAST_STEP, {"decode": {"num_workers": num_workers}})
    for _ in range(3):
        run.sit(1, kill_after_lines=draw.randint(1, 20))
    run.sit(1)
    check(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 3, 4])
def test_killed_inside_and_at_the_edge_of_a_pass_and_again_straight_after(root, expected, tmp_path, first):
    """Passes of the videos end after steps 2, 5, 8 and 11 of the run."""
    run = Run(root, tmp_path, LAST_STEP)
    assert not run.sit(1, {0: ("step", first + 1)})
    at = run.cursor().step
    assert at == first // SAVE_EVERY * SAVE_EVERY
    assert not run.sit(1, {0: ("step", 1)})  # saved once, straight after the restore, without a step
    assert not run.sit(1, {0: ("save", 2)})
    assert run.cursor().step == at
    assert run.sit(1)
    check(run, expected)


@pytest.mark.slow
def test_two_ranks_then_one_then_two(root, expected, tmp_path):
    draw = seeded()
    run = Run(root, tmp_path, LAST_STEP)
    assert not run.sit(2, {draw.randrange(2): ("step", draw.randint(3, 5))})
    assert not run.sit(1, {0: ("step", draw.randint(3, 5))})
    assert run.sit(2)
    assert run.cursor().step == LAST_STEP
    check(run, expected)


def test_four_ranks_then_two_then_four(root, expected, tmp_path):
    draw = seeded()
    run = Run(root, tmp_path, LAST_STEP)
    assert not run.sit(4, {draw.randrange(4): (draw.choice(POINTS[:3]), draw.randint(5, 6))})
    assert not run.sit(2, {draw.randrange(2): ("step", draw.randint(3, 4))})
    assert run.sit(4)
    check(run, expected)


STEPS = {"train.max_steps": 8, "train.checkpoint_every": 3, "train.keep_checkpoints": 9}
CALM = {"model.text.dropout": 0, "model.video.drop_path": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def trained(monkeypatch):
    """Trains in this process; gives the keys and digests of every step that it made."""

    def trained(run):
        run.run_dir.mkdir(parents=True, exist_ok=True)
        log = run.run_dir / "log"
        log.unlink(missing_ok=True)
        undo = log_steps(log)
        try:
            finished = train(run)
        finally:
            undo()
        return finished, read_entries(log)

    return trained


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An undisturbed training run, and what it got."""
    run = config(corpus, tmp_path_factory.mktemp("whole"), **STEPS)
    undo = log_steps(run.run_dir / "log")
    train(run)
    undo()
    return run.run_dir, read_entries(run.run_dir / "log")


def steps_of(entries):
    return list(dict.fromkeys(step for step, _ in entries))


def keys_of(entries, steps):
    return {(step, key) for (step, _), (keys, _) in entries.items() if step in steps for key in keys}


def copied(whole, folder, step):
    """The run as it was at a checkpoint."""
    shutil.copytree(whole[0], folder)
    for path in complete_checkpoints(folder):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return folder


def test_a_training_run_killed_in_its_decoder(corpus, whole, tmp_path):
    run = config(corpus, tmp_path, **STEPS)
    assert train_until_death(run, arm_stream, "decoder", 8) == -signal.SIGKILL
    assert not train(run).already_done
    assert_same_run(tmp_path, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("point", ["reader", "decoder"])
def test_a_training_run_killed_in_its_stream_at_random_moments(corpus, whole, tmp_path, point, num_workers):
    draw = seeded()
    run = config(corpus, tmp_path, **STEPS, **{"stream.decode.num_workers": num_workers})
    for _ in range(2):
        call = draw.randint(1, 35 if point == "reader" else 6)
        print(f"{point} call {call}")
        assert train_until_death(run, arm_stream, point, call) in (0, -signal.SIGKILL)
    train(run)
    assert_same_run(tmp_path, whole[0])


def test_saved_straight_after_a_restore_without_a_step(corpus, whole, trained, tmp_path, monkeypatch):
    run = config(corpus, copied(whole, tmp_path / "run", 3), **STEPS)
    state = read_state(latest_checkpoint(run.run_dir))

    def save_at_once(self):
        # What is there already would be in the way.
        latest_checkpoint(run.run_dir).rename(tmp_path / "restored")
        self._save()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", save_at_once)
        train(run)
    assert read_state(latest_checkpoint(run.run_dir)) == state
    _, entries = trained(run)
    assert steps_of(entries) == [3, 4, 5, 6, 7]
    assert_same_run(run.run_dir, whole[0])


@pytest.mark.parametrize(
    ("skip_steps", "steps", "skipped"),
    [
        ([[2, 4]], [0, 1, 4, 5, 6, 7], [[2, 4]]),
        ([[0, 2]], [2, 3, 4, 5, 6, 7], [[0, 2]]),
        ([[5, 6], [1, 3], [2, 5]], [0, 6, 7], [[1, 6]]),
        # Nothing comes after them that could record them.
        ([[6, 8]], [0, 1, 2, 3, 4, 5], []),
        ([[6, 99]], [0, 1, 2, 3, 4, 5], []),
    ],
)
def test_steps_that_are_left_out_leave_the_others_as_they_are(
    corpus, whole, trained, tmp_path, skip_steps, steps, skipped
):
    finished, entries = trained(config(corpus, tmp_path, **STEPS, **{"stream.skip_steps": skip_steps}))
    assert steps_of(entries) == steps
    assert entries == {place: entry for place, entry in whole[1].items() if place[0] in steps}
    assert [line["step"] for line in metrics_of(tmp_path)] == [step + 1 for step in steps]
    # Each step has the learning rate that is its own.
    rates = {line["step"]: line["learning_rate"] for line in metrics_of(whole[0])}
    assert all(line["learning_rate"] == rates[line["step"]] for line in metrics_of(tmp_path))
    assert read_state(finished.checkpoint)["cursor"] == {"step": steps[-1] + 1, "skipped": skipped}
    assert train(config(corpus, tmp_path, **STEPS, **{"stream.skip_steps": skip_steps})).already_done


def test_steps_that_are_left_out_from_a_resume_on_are_recorded_for_good(corpus, whole, trained, tmp_path):
    run_dir = copied(whole, tmp_path / "run", 3)
    _, entries = trained(config(corpus, run_dir, **{**STEPS, "train.max_steps": 6}, **{"stream.skip_steps": [[3, 5]]}))
    assert steps_of(entries) == [5]
    assert read_state(latest_checkpoint(run_dir))["cursor"] == {"step": 6, "skipped": [[3, 5]]}
    # The second resume no longer names them, and leaves out another.
    finished, later = trained(config(corpus, run_dir, **STEPS, **{"stream.skip_steps": [[6, 7]]}))
    assert steps_of(later) == [7]
    assert read_state(finished.checkpoint)["cursor"] == {"step": 8, "skipped": [[3, 5], [6, 7]]}
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 3, 6, 8]
    assert entries | later == {place: entry for place, entry in whole[1].items() if place[0] in (5, 7)}


def test_leaving_out_all_that_is_left_ends_the_run_where_it_is(corpus, whole, tmp_path):
    run_dir = copied(whole, tmp_path / "run", 6)
    finished = train(config(corpus, run_dir, **STEPS, **{"stream.skip_steps": [[6, 7], [7, 20]]}))
    assert finished.already_done
    assert finished.checkpoint.name == "step-000006"


def test_leaving_out_everything_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"stream\.skip_steps leaves out all 8 steps of the run"):
        train(config(corpus, tmp_path, **STEPS, **{"stream.skip_steps": [[0, 8]]}))


def other_order_of_words(corpus, folder):
    """The same corpus with a tokenizer whose ids mean other words."""
    shutil.copytree(corpus, folder)
    path = folder / "tokenizer" / "vocab.txt"
    words = path.read_text().split()
    path.write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")
    return folder


def other_data(corpus, folder):
    shutil.copytree(corpus, folder)
    shutil.rmtree(folder / "train")
    # As many shards, so that the windows are the same.
    write_dataset(folder / "train", video_shards=(6, 6, 6, 7), image_shards=(9,), size=64)
    return folder


def test_another_seed_is_accepted_by_name_alone(corpus, whole, tmp_path, caplog):
    run_dir = copied(whole, tmp_path / "run", 6)
    other = {**STEPS, "stream.seed": 7}
    for accept in ([], ["text"], ["see"]):
        with pytest.raises(CheckpointError, match=r"seed: 42 != 7\. .*accept=\[seed\]"):
            train(config(corpus, run_dir, **other, accept=accept))
    with caplog.at_level(logging.WARNING, logger="alpro_stream"):
        assert not train(config(corpus, run_dir, **other, accept=["seed"])).already_done
    assert "seed: 42 != 7" in caplog.text
    assert read_state(latest_checkpoint(run_dir))["fingerprint"]["seed"] == 7
    assert read_state(latest_checkpoint(run_dir))["cursor"]["step"] == 8


@pytest.mark.parametrize(
    ("change", "names"),
    [(other_data, ["sources.0.dataset", "sources.1.dataset"]), (other_order_of_words, ["tokenizer"])],
)
def test_other_data_and_tokenizers_are_accepted_by_name_alone(corpus, whole, tmp_path, change, names):
    run_dir = copied(whole, tmp_path / "run", 6)
    other = change(corpus, tmp_path / "corpus")
    saved = read_state(latest_checkpoint(run_dir))["fingerprint"]
    with pytest.raises(CheckpointError, match=rf"{names[0]}: '[0-9a-f]{{64}}' != '[0-9a-f]{{64}}'") as caught:
        train(config(other, run_dir, **STEPS, accept=["seed", *names[1:]]))
    digest = saved["tokenizer"]
    if change is other_data:
        digest = load_dataset_info(corpus / "train").digest
        assert load_dataset_info(other / "train").digest in str(caught.value)
    assert digest in str(caught.value)
    assert not train(config(other, run_dir, **STEPS, accept=names)).already_done
    changed = read_state(latest_checkpoint(run_dir))["fingerprint"]
    assert {name for name in saved if saved[name] != changed[name]} == {names[0].partition(".")[0]}


def train_on_a_rank(corpus, run_dir, sitting, dies_at, changes):
    """Trains on one of several ranks, and logs what it got; the first rank may die, and with it the others."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log_steps(run_dir / f"log-{sitting}-{dist.get_rank()}")
    if dies_at and dist.get_rank() == 0:
        die_at_step(dies_at)
    train(config(corpus, run_dir, **changes))


def sit(world_size, corpus, run_dir, sitting, dies_at, changes):
    arguments = (corpus, run_dir, sitting, dies_at, changes)
    if not dies_at:
        run_ranks(train_on_a_rank, world_size, *arguments, preload=PRELOAD)
        return
    # Which of the ranks is seen first is a matter of chance: the others lose their connection to it.
    with pytest.raises(RankError):
        run_ranks(train_on_a_rank, world_size, *arguments, preload=PRELOAD)


def logged(run_dir, sitting):
    found = {}
    for path in run_dir.glob(f"log-{sitting}-*"):
        found |= read_entries(path)
    return found


def assert_close_runs(found, expected):
    """Sums over the ranks are made in another order, which changes float32 values by some 1e-7 of their size.

    Twelve steps make of that 2e-7 in the losses, 3e-7 in the weights and 6e-5 in the norm of the gradient, which is
    small beside the terms that it is a sum of. Allowed is ten times as much; without the optimizer's moments the norm
    is off by a hundred times more.
    """
    ours, theirs = metrics_of(found), metrics_of(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, tolerance in (("loss/vtc", 2e-6), ("gradient_norm", 6e-4)):
            assert one[name] == pytest.approx(other[name], rel=tolerance), f"{name} of step {one['step']}"
        assert (one["learning_rate"], one["source"]) == (other["learning_rate"], other["source"])
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 3e-6


PLAIN = {**STEPS, **CALM, "train.engine.zero_stage": 0}


def test_training_goes_on_with_another_number_of_ranks(corpus, tmp_path):
    """Without ZeRO every rank has the whole state."""
    whole = config(corpus, tmp_path / "whole", **PLAIN)
    undo = log_steps(whole.run_dir.parent / "log")
    train(whole)
    undo()
    run_dir = tmp_path / "run"
    assert train_until_death(config(corpus, run_dir, **PLAIN), die_at_step, 5) == -signal.SIGKILL
    sit(2, corpus, run_dir, 1, 0, PLAIN)
    expected = read_entries(tmp_path / "log")
    assert logged(run_dir, 1) == {place: entry for place, entry in expected.items() if place[0] >= 3}
    assert_close_runs(run_dir, whole.run_dir)
    assert read_state(latest_checkpoint(run_dir))["world_size"] == 2


@pytest.mark.slow
def test_training_on_four_ranks_then_two_then_four(corpus, tmp_path):
    changes = {**PLAIN, "train.max_steps": 12}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    sit(4, corpus, whole, 0, 0, changes)
    expected = logged(whole, 0)
    assert len(expected) == 12 * NUM_LANES
    sit(4, corpus, run_dir, 0, 4, changes)
    sit(2, corpus, run_dir, 1, 8, changes)
    sit(4, corpus, run_dir, 2, 0, changes)
    for sitting, steps in enumerate((range(3), range(3, 6), range(6, 12))):
        found = logged(run_dir, sitting)
        assert steps_of(found)[0] == steps.start
        assert found.keys() >= {(step, lane) for step in steps for lane in range(NUM_LANES)}
        assert all(entry == expected[place] for place, entry in found.items())
    assert_close_runs(run_dir, whole)


def train_on_three(corpus, run_dir):
    """What is said, and whether a model was built first."""
    import alpro_stream.run

    built = []
    build = alpro_stream.run._build
    alpro_stream.run._build = lambda *arguments: built.append(1) or build(*arguments)
    try:
        train(config(corpus, run_dir, **PLAIN))
    except AlproError as error:
        return str(error), built
    return "trained", built


def test_ranks_that_do_not_divide_the_lanes_are_refused_before_a_model_is_built(corpus, tmp_path):
    for message, built in run_ranks(train_on_three, 3, corpus, tmp_path, preload=PRELOAD):
        assert "3 ranks do not divide the 4 lanes of this run; allowed numbers of ranks: 1, 2, 4 " in message
        assert built == []
