"""Evaluation on several ranks: the same scores, the work in parts, and one message when a rank fails."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from retrieval_files import evaluation, write_checkpoint, write_split

from alpro_launch.cli import main
from alpro_launch.evaluate import main as entry
from alpro_stream.config import validate
from alpro_stream.errors import AlproError
from alpro_stream.evaluate import zero_shot
from alpro_stream.evaluate.embed import evenly_spread, stored_clips
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.retrieval import evaluate
from alpro_stream.exit_status import DATA, HARDWARE
from alpro_stream.media import FrameConfig
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.text_encoder import MultimodalEncoder
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.distributed import join_world
from alpro_stream.train.restore import load_trained

PRELOAD = ["alpro_stream.evaluate.retrieval", "alpro_stream.evaluate.zero_shot"]
# 7 videos and 11 captions: neither is divided by 2 or 3 ranks.
CAPTIONS = [["a red dog", "the dog"], ["a cat"], ["a car", "the blue car", "one car"], ["a tree"], ["a boat", "boat"]]
CAPTIONS += [["a house moves"], ["a bird moves"]]
# Of 8 captions 5 differ.
TWINS = [["a dog", "a red dog"], ["a cat"], ["a dog", "a car"], ["a cat"], ["a tree", "a dog"]]
NUM_VIDEOS, NUM_CAPTIONS = 7, 11


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_split(folder / "split", CAPTIONS)
    write_split(folder / "few", CAPTIONS[:2])
    write_split(folder / "twins", TWINS)
    write_checkpoint(folder / "model")
    return folder


def evaluate_on_a_rank(root, split, out, changes):
    """What a rank finds, and how many rows it has put through each part of the model."""
    rows = Counter()
    for owner, method in ((DualEncoder, "encode_video"), (DualEncoder, "encode_text"), (MultimodalEncoder, "forward")):
        _count(rows, owner, method)
    result = evaluate(evaluation(root, root / split, out=out, **changes), join_world(60))
    return result["metrics"], dict(rows)


def _count(rows, owner, method):
    original = getattr(owner, method)

    def counting(self, first, *rest, **named):
        rows[method] += len(first)
        return original(self, first, *rest, **named)

    setattr(owner, method, counting)


def on_ranks(number, *arguments):
    return run_ranks(evaluate_on_a_rank, number, *arguments, preload=PRELOAD)


def scores_of(folder):
    with np.load(folder / "scores.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mode": "rerank", "top_k": 2}, {"num_clips": 2, "aggregation": "lse", "dual_softmax": True}],
    ids=["exact", "rerank", "clips"],
)
def test_any_number_of_ranks_gives_the_same_scores(root, tmp_path, changes):
    alone = {"out": tmp_path / "alone", **changes}
    expected = evaluate(evaluation(root, root / "split", **alone))["metrics"]
    for number in (1, 2, 3):
        found = on_ranks(number, root, "split", tmp_path / str(number), changes)
        for metrics, _ in found:
            assert metrics == expected
        ours, theirs = scores_of(tmp_path / str(number)), scores_of(tmp_path / "alone")
        assert ours.keys() == theirs.keys()
        for name in ours:
            if ours[name].dtype.kind == "f":
                np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
            else:
                assert (ours[name] == theirs[name]).all()


def test_each_rank_does_its_part(root, tmp_path):
    for number in (2, 3):
        found = [rows for _, rows in on_ranks(number, root, "split", tmp_path / str(number), {})]
        # As many on each: the last item again where there are too few.
        videos, captions = -(-NUM_VIDEOS // number), -(-NUM_CAPTIONS // number)
        part = {"encode_video": videos, "encode_text": captions, "forward": captions * NUM_VIDEOS}
        assert found == [part] * number


@pytest.mark.parametrize("changes", [{}, {"mode": "rerank", "top_k": 3}], ids=["exact", "rerank"])
def test_equal_captions_are_equal_on_any_number_of_ranks(root, tmp_path, changes):
    alone = evaluate(evaluation(root, root / "twins", out=tmp_path / "alone", **changes))
    assert alone["split"]["captions_of_several_videos"] == 5
    for number in (2, 3):
        found = on_ranks(number, root, "twins", tmp_path / str(number), {**changes, "batch_size": 3})
        assert [metrics for metrics, _ in found] == [alone["metrics"]] * number
        vtm = scores_of(tmp_path / str(number))["vtm"]
        assert (vtm[0] == vtm[3]).all()
        assert (vtm[0] == vtm[7]).all()


def test_more_ranks_than_videos(root, tmp_path):
    expected = evaluate(evaluation(root, root / "few", out=tmp_path / "alone"))["metrics"]
    assert [metrics for metrics, _ in on_ranks(3, root, "few", tmp_path / "three", {})] == [expected] * 3


def recognise_on_a_rank(root, out):
    """Scores of all classes, as they are counted, and the result."""
    seen = []
    original = zero_shot.share_in_top
    zero_shot.share_in_top = lambda scores, truth, k: seen.append(scores) or original(scores, truth, k)
    try:
        result = zero_shot.recognise(recognition(root, out), join_world(60))
    finally:
        zero_shot.share_in_top = original
    return seen[0].tolist(), result["metrics"]


def recognition(root, out):
    values = {
        "task": "recognition",
        "checkpoint": root / "model",
        "sources": [{"path": root / "split"}],
        "out": out,
        "batch_size": 4,
        "decode": {"num_workers": 0},
    }
    return validate(zero_shot.RecognitionConfig, values, source="test")


def test_ranks_recognise_as_one(root, tmp_path):
    """7 videos, the scores of each in their order."""
    trained = load_trained(root / "model", torch.device("cpu"))
    clips = stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 64, None)
    how = Encoding(evenly_spread(2, FrameConfig()), decoder, trained.tokenizer, batch_size=32)
    in_order = zero_shot.class_scores(trained, clips, sorted({own[0] for own in CAPTIONS}), how)
    decoder.close()
    ((alone, metrics),) = run_ranks(recognise_on_a_rank, 1, root, tmp_path / "1", preload=PRELOAD)
    np.testing.assert_allclose(alone, in_order, rtol=0, atol=1e-4)
    for number in (2, 3):
        for scores, theirs in run_ranks(recognise_on_a_rank, number, root, tmp_path / str(number), preload=PRELOAD):
            np.testing.assert_allclose(scores, alone, rtol=0, atol=1e-4)
            assert theirs == metrics
    assert np.abs(np.diff(alone, axis=0)).min(axis=1).max() > 1e-3


def fail_on_a_rank(root, out):
    world = join_world(60)
    if world.rank == 1:
        DualEncoder.encode_video = _refuse
    try:
        evaluate(evaluation(root, root / "split", out=out), world)
    except AlproError as error:
        return type(error).__name__, str(error)
    return "fine", ""


def _refuse(self, video):
    raise AlproError("no such pixels")


def test_a_rank_that_fails_ends_all_and_leaves_no_result(root, tmp_path):
    first, second = run_ranks(fail_on_a_rank, 2, root, tmp_path / "out", preload=PRELOAD)
    assert first == ("OtherRankError", "rank 1 failed: no such pixels")
    assert second == ("AlproError", "no such pixels")
    assert not (tmp_path / "out/result.json").exists()


def test_the_command_starts_ranks_and_makes_their_result_again(root, tmp_path, capfd):
    config = evaluation(root, root / "split", out=tmp_path / "out")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["evaluate", str(path), "--ranks", "2"]) == 0
    assert main(["evaluate", str(tmp_path / "out/result.json")]) == 0
    assert "the same as" in capfd.readouterr().out


def command_of(root, tmp_path, **changes):
    config = evaluation(root, root / "split", out=tmp_path / "out", **changes)
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return [str(Path(sys.executable).with_name("alpro")), "evaluate", str(tmp_path / "config.yaml"), "--ranks", "2"]


def test_ranks_that_fail_are_the_status_of_the_command(root, tmp_path):
    command = command_of(root, tmp_path, sources=[{"path": root / "split"}, {"path": root / "split", "name": "again"}])
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == DATA
    assert "are there twice" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_rank_that_is_killed_is_the_status_of_the_command(root, tmp_path):
    with subprocess.Popen(command_of(root, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while len(ranks := psutil.Process(process.pid).children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks[1].send_signal(signal.SIGKILL)
        shown = process.communicate(timeout=120)[1].decode()
    assert process.returncode == HARDWARE
    assert "rank 1 of this machine was ended by SIGKILL (out of memory, perhaps)\n" in shown
    assert not (tmp_path / "out/result.json").exists()


def test_the_entry_of_a_rank_ends_with_one_message_and_its_status(root, tmp_path):
    config = evaluation(root, root / "split", out=tmp_path / "none")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    (root / "split/video-000000.tar").rename(root / "split/away")
    try:
        # In a process of its own: the group that it makes is that of all later tests else.
        command = [sys.executable, "-m", "alpro_launch.evaluate", "--local_rank=0", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        (root / "split/away").rename(root / "split/video-000000.tar")
    shown = ended.stderr
    assert ended.returncode == DATA
    assert "video-000000" in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "none/result.json").exists()
    assert entry(["--ranks", "2"]) == 2
