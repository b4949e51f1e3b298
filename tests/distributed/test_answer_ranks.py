"""Question answering on several ranks: the losses of one, and the answers of one, however the questions are split."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from answer_files import write_answerable
from test_evaluate_answers import evaluation, write_answering

from alpro_stream.config import validate
from alpro_stream.evaluate.question_answering import evaluate_answers
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.testing.shards import write_tokenizer
from alpro_stream.train.distributed import join_world
from alpro_stream.train.metrics import read_metrics

PRELOAD = ["alpro_stream.run"]


def train_on_rank(root, run_dir):
    changes = {
        "task": "question_answering",
        "stream.unit": "question",
        "stream.sources": [{"path": str(root / "split")}],
        "answers.num": 4,
        "model.text.dropout": 0.0,
        "model.video.drop_path": 0.0,
        "train.max_steps": 2,
    }
    train(validate(RunConfig, tiny_run(root, run_dir, changes), source="test"))


def answer_on_rank(root, out):
    return evaluate_answers(evaluation(root, out), join_world(60.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """5 videos with 10 questions, which neither 2 nor 3 ranks share evenly."""
    folder = tmp_path_factory.mktemp("answers")
    write_answerable(folder / "split", (3, 2))
    write_tokenizer(folder / "tokenizer")
    write_answering(folder / "model", folder / "split")
    return folder


def test_two_ranks_train_as_one(root, tmp_path):
    for size in (1, 2):
        run_ranks(train_on_rank, size, root, tmp_path / str(size), preload=PRELOAD)
    one, two = (read_metrics(tmp_path / str(size)) for size in (1, 2))
    assert len(one) == 2
    for first, second in zip(one, two, strict=True):
        for name in ("loss/answer", "answer/right", "answer/unlisted", "gradient_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    assert one[0]["answer/unlisted"] > 0


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_answer_as_one(root, tmp_path, size):
    """With 7 ranks, two of them have no video."""
    alone = evaluate_answers(evaluation(root, tmp_path / "alone"))
    results = run_ranks(answer_on_rank, size, root, tmp_path / "ranks", preload=PRELOAD)
    for result in results:
        assert [result[part] for part in ("metrics", "split", "protocol")] == [
            alone[part] for part in ("metrics", "split", "protocol")
        ]
    lines = [(tmp_path / name / "answers.jsonl").read_text() for name in ("alone", "ranks")]
    assert lines[0] == lines[1]
    assert len({json.loads(line)["given"] for line in lines[0].splitlines()}) > 1
