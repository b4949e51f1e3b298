"""Fine-tuning runs: retrieval with VTC and VTM, question answering with an answer list."""

import json

import pytest
import torch
from answer_files import write_answerable, write_questions

from alpro_stream.config import validate
from alpro_stream.errors import CheckpointError, ConfigError, DataError
from alpro_stream.model.weight_files import WEIGHTS_FILE, read_tensors
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.shards import write_tokenizer
from alpro_stream.train.checkpoint import latest_checkpoint, read_state
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.restore import load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """24 videos with two questions each, and 10 answers."""
    folder = tmp_path_factory.mktemp("questions")
    write_answerable(folder / "train")
    write_tokenizer(folder / "tokenizer")
    return folder


def run_of(corpus, run_dir, task, **changes):
    return validate(RunConfig, tiny_run(corpus, run_dir, {"task": task, **changes}), source="test")


def answering(questions, run_dir, **changes):
    given = {
        "stream.sources": [{"path": str(questions / "train")}],
        "stream.unit": "question",
        "stream.frames": "random",
        "answers.num": 6,
        **changes,
    }
    return run_of(questions, run_dir, "question_answering", **given)


@pytest.fixture(scope="module")
def answered(questions, tmp_path_factory):
    """Run directory of question answering, 6 steps with a checkpoint in the middle."""
    run_dir = tmp_path_factory.mktemp("answered")
    train(answering(questions, run_dir))
    return run_dir


def losses(run_dir, name="loss/answer"):
    return [line[name] for line in read_metrics(run_dir)]


def test_a_run_of_question_answering_leaves_a_model_with_its_answers(answered):
    trained = load_trained(answered, CPU)
    assert trained.description.answers == ("blue", "green", "red", "yellow", "boat", "car")
    assert trained.model.answer_head[-1].out_features == 6
    assert trained.model.vtm_head is None
    (line, *_) = lines = read_metrics(answered)
    assert {"loss/answer", "answer/right", "answer/unlisted"} <= line.keys()
    assert not {"loss/vtc", "loss/answer/right"} & line.keys()
    # A pass has each question once; of its 48, 16 have none of the six answers.
    assert sum(line["answer/unlisted"] for line in lines) * 8 == pytest.approx(16)


@pytest.mark.parametrize("changes", [{"train.engine.zero_stage": 0}, {"train.engine.num_micro_batches": 4}])
def test_stages_and_micro_batches_change_nothing(questions, tmp_path, changes):
    exact = {"model.text.dropout": 0.0, "model.video.drop_path": 0.0}
    for name, change in (("one", {}), ("other", changes)):
        train(answering(questions, tmp_path / name, **exact, **change))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "other", "answer/right") == pytest.approx(losses(tmp_path / "one", "answer/right"))


def test_it_goes_on_bit_for_bit(questions, answered, tmp_path):
    train(answering(questions, tmp_path), lambda: True)
    assert len(read_metrics(tmp_path)) == 1
    train(answering(questions, tmp_path))
    assert losses(tmp_path) == losses(answered)
    ours, theirs = (read_tensors(latest_checkpoint(folder) / WEIGHTS_FILE) for folder in (tmp_path, answered))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_another_answer_list_is_refused(questions, answered):
    with pytest.raises(CheckpointError, match="answers: '"):
        train(answering(questions, answered, **{"answers.num": 5, "train.max_steps": 9}))


def test_a_run_without_answers_has_none_in_its_fingerprint(corpus, tmp_path):
    finished = train(run_of(corpus, tmp_path, "retrieval", **{"train.max_steps": 1}))
    assert "answers" not in read_state(finished.checkpoint)["fingerprint"]


def test_the_answer_head_goes_on_where_the_answers_are_the_same(questions, answered, tmp_path):
    """Starting weights: the same answers take the head along, others begin a new one."""
    changes = {"start_from": str(answered), "train.max_steps": 1, "train.optimizer.learning_rate": 1e-12}
    before = load_trained(answered, CPU).model.answer_head[-1].weight
    for num, is_same in ((6, True), (5, False)):
        train(answering(questions, tmp_path / str(num), **changes, **{"answers.num": num}))
        after = load_trained(tmp_path / str(num), CPU).model.answer_head[-1].weight
        assert torch.allclose(after[:5], before[:5], atol=1e-6) == is_same


def test_question_answering_starts_from_pretraining_with_more_frames(corpus, questions, tmp_path):
    pretrain = {"losses.pem.weight": 0, "train.max_steps": 1, "stream.text.tokenizer": str(questions / "tokenizer")}
    start = train(run_of(corpus, tmp_path / "pretrain", "pretrain", **pretrain)).checkpoint
    changes = {"start_from": str(start), "model.video.num_frames": 4, "train.max_steps": 1}
    finished = train(answering(questions, tmp_path / "qa", **changes, **{"train.optimizer.learning_rate": 1e-12}))
    before, after = (load_trained(folder, CPU).model for folder in (start, finished.checkpoint))
    assert torch.allclose(
        before.multimodal.layers[0].output.dense.weight, after.multimodal.layers[0].output.dense.weight
    )
    assert after.dual.video_encoder.time_embed.shape[1] == 4


@pytest.mark.parametrize("task", ["retrieval", "prompter"])
def test_a_model_that_answers_is_a_poor_start_for_features(corpus, questions, answered, tmp_path, caplog, task):
    changes = {"start_from": str(answered), "stream.text.tokenizer": str(questions / "tokenizer")}
    train(run_of(corpus, tmp_path, task, **changes, **{"train.max_steps": 1}))
    assert "was trained to answer questions" in caplog.text
    assert "the model that it was fine-tuned from is a better start" in caplog.text


def test_retrieval_is_pretraining_with_vtc_and_vtm_alone(corpus, tmp_path):
    train(run_of(corpus, tmp_path / "retrieval", "retrieval", **{"train.max_steps": 2}))
    only = {"losses.mlm": 0, "losses.pem.weight": 0, "train.max_steps": 2}
    train(run_of(corpus, tmp_path / "pretrain", "pretrain", **only))
    lines = read_metrics(tmp_path / "retrieval")
    assert {name for name in lines[0] if name.startswith("loss/")} == {"loss/vtc", "loss/vtm"}
    # The heads beyond are drawn at random too, so the two models do not start as one.
    assert load_trained(tmp_path / "retrieval", CPU).model.mlm_head is None
    assert lines[0]["loss/vtm"] == pytest.approx(read_metrics(tmp_path / "pretrain")[0]["loss/vtm"], rel=0.2)


def test_validation_of_question_answering_asks_held_out_questions(questions, tmp_path):
    held_out = {"validation.sources": [{"path": str(questions / "train")}], "validation.every": 3}
    train(answering(questions, tmp_path, **held_out))
    last = read_metrics(tmp_path)[-1]
    found = {name for name in last if name.startswith("validation/")}
    assert found == {"validation/answer", "validation/answer/right", "validation/answer/unlisted"}
    assert last["validation/answer/unlisted"] == pytest.approx(16 / 48)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("question_answering", {}, "stream.unit is clip; question answering reads questions .* stream.unit=question"),
        ("retrieval", {"losses.vtc": 0, "losses.vtm": 0}, "trained with VTC and VTM, and both have weight 0"),
        ("retrieval", {"stream.global_batch": 4}, "leaves one sample in a lane, where VTM finds no negative"),
        (
            "question_answering",
            {"stream.unit": "question", "answers.num": 1},
            "answers.num.*greater than or equal to 2",
        ),
        ("captioning", {}, "'task': Input should be 'prompter', 'pretrain', 'retrieval' or 'question_answering'"),
    ],
)
def test_settings_that_do_not_fit_the_task(corpus, tmp_path, task, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_of(corpus, tmp_path, task, **changes)


def test_data_without_questions_are_refused_before_anything_is_built(corpus, tmp_path):
    with pytest.raises(DataError, match=r"no question in .*question answering needs rows with a question"):
        train(run_of(corpus, tmp_path, "question_answering", **{"stream.unit": "question"}))


def test_a_file_without_any_answer_of_the_data_is_refused(questions, tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps(["tiger", "lion"]))
    with pytest.raises(ConfigError, match="none of the 48 training questions has an answer of"):
        train(answering(questions, tmp_path / "run", **{"answers.file": str(tmp_path / "answers.json")}))


def test_a_source_whose_questions_are_all_excluded_is_named(tmp_path, questions):
    write_questions(tmp_path / "train", [[[("what?", "dog")]], [[]]])
    (tmp_path / "exclude.txt").write_text("video-00000\n")
    sources = [{"path": str(tmp_path / "train"), "exclude": str(tmp_path / "exclude.txt")}]
    with pytest.raises(Exception, match=r"has 0 questions in its 2 samples, 1 of them excluded"):
        train(answering(questions, tmp_path / "run", **{"stream.sources": sources}))
