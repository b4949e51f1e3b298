"""What an evaluation of any task writes, when it is refused, and what is read of a result."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from answer_files import write_answerable
from retrieval_files import evaluation, write_checkpoint, write_split
from test_evaluate_answers import evaluation as answer_evaluation
from test_evaluate_answers import write_answering

from alpro_launch.cli import main
from alpro_launch.share_tables import shares_table
from alpro_launch.tables import results_table
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate import progress
from alpro_stream.evaluate.embed import embed_texts
from alpro_stream.evaluate.overlap import num_trained_on
from alpro_stream.evaluate.question_answering import evaluate_answers
from alpro_stream.evaluate.retrieval import evaluate
from alpro_stream.evaluate.validation import warn_of_known
from alpro_stream.evaluate.zero_shot import RecognitionConfig, recognise
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.restore import load_trained

CAPTIONS = [["a red dog moves"], ["a green cat moves"], ["a blue car"], ["a yellow tree moves"], ["a boat"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_split(folder / "split", CAPTIONS)
    write_answerable(folder / "questions", (3,))
    write_checkpoint(folder / "model")
    write_answering(folder / "answering", folder / "questions")
    return folder


@pytest.fixture
def run(root, tmp_path):
    return lambda **changes: evaluate(evaluation(root, root / "split", **{"out": tmp_path / "out", **changes}))


def recognition(root, out, **changes):
    values = {
        "task": "recognition",
        "checkpoint": root / "model",
        "sources": [{"path": root / "split"}],
        "out": out,
        "decode": {"num_workers": 0},
        **changes,
    }
    return validate(RecognitionConfig, values, source="test")


def answers(root, out, **changes):
    values = {"checkpoint": root / "answering", "sources": [{"path": root / "questions"}], **changes}
    return answer_evaluation(root, out, **values)


def names(folder):
    return {path.name for path in folder.iterdir()}


@contextmanager
def at_most(num_bytes):
    """No file of this process may be larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_another_evaluation_left_in_the_folder_goes_with_its_result(root, run, tmp_path):
    run()
    assert names(tmp_path / "out") == {"result.json", "scores.npz"}
    evaluate_answers(answers(root, tmp_path / "out"))
    assert names(tmp_path / "out") == {"result.json", "answers.jsonl"}
    recognise(recognition(root, tmp_path / "out"))
    assert names(tmp_path / "out") == {"result.json"}
    run()
    run(keep_scores=False)
    assert names(tmp_path / "out") == {"result.json"}


@pytest.mark.parametrize("keep_scores", [True, False], ids=["at the scores", "at the result"])
def test_a_full_disk_leaves_no_result_and_no_half_file(run, tmp_path, keep_scores):
    run()
    with at_most(500), pytest.raises(OSError, match="File too large"):
        run(keep_scores=keep_scores)
    assert names(tmp_path / "out") == set()


def test_a_full_disk_leaves_no_half_file_of_features(run, tmp_path):
    with at_most(2000), pytest.raises(Exception, match="File too large"):
        run(cache_dir=tmp_path / "cache")
    assert names(tmp_path / "cache") == set()
    run(cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("features-*"))) == 1


@pytest.mark.parametrize("task", ["retrieval", "question_answering", "recognition"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(root, tmp_path, monkeypatch, task):
    monkeypatch.setattr(DualEncoder, "encode_video", lambda *_: pytest.fail("encoded"))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/out"
    work = {
        "retrieval": lambda: evaluate(evaluation(root, root / "split", out=out)),
        "question_answering": lambda: evaluate_answers(answers(root, out)),
        "recognition": lambda: recognise(recognition(root, out)),
    }
    with pytest.raises(ConfigError, match=r"out=.*file/out cannot be written to \(Not a directory\): set out to"):
        work[task]()


def test_a_data_set_given_twice_is_refused(root, tmp_path):
    sources = [{"path": root / "split", "name": "one"}, {"path": root / "split", "name": "other"}]
    message = r"5 of 10 samples are there twice, such as video-00000 in .*split .*and in .*exclude"
    for work in (
        lambda: evaluate(evaluation(root, root / "split", out=tmp_path / "out", sources=sources)),
        lambda: recognise(recognition(root, tmp_path / "out", sources=sources)),
    ):
        with pytest.raises(DataError, match=message):
            work()


def write_run(root, folder, source):
    """A checkpoint as of a run that was trained on a source."""
    write_checkpoint(folder)
    (folder / "config.yaml").write_text(json.dumps({"stream": {"sources": [source]}}))


def test_what_the_model_was_trained_on_is_counted_and_said(root, tmp_path, caplog):
    """A part of the split, of which one sample is excluded."""
    write_split(tmp_path / "trained", CAPTIONS[:3])
    (tmp_path / "exclude.txt").write_text("video-00001\n")
    source = {"path": str(tmp_path / "trained"), "exclude": str(tmp_path / "exclude.txt")}
    write_run(root, tmp_path / "model", source)
    found = evaluate(evaluation(tmp_path, root / "split", out=tmp_path / "out"))
    assert found["split"]["num_trained_on"] == 2
    assert "2 of the 5 videos and images are among those that" in caplog.text
    caplog.clear()
    # Elsewhere by now: not known, which is no difference.
    (tmp_path / "trained").rename(tmp_path / "moved")
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/again/result.json").read_text())["split"]["num_trained_on"] is None
    assert "are among those" not in caplog.text


@pytest.mark.parametrize(
    "config", ["stream: 1", "{}", "stream: {sources: [{path: 's3://bucket/split'}]}", "stream: {sources: [{}]}", "a: ["]
)
def test_what_a_model_was_trained_on_is_not_always_known(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config)
    assert num_trained_on({"video-00000"}, tmp_path) is None
    assert num_trained_on({"video-00000"}, tmp_path / "none") is None


def test_held_out_samples_that_are_trained_on_are_said(root, tmp_path, caplog):
    write_split(tmp_path / "trained", CAPTIONS[:3])
    trained_on = SourceConfig(path=str(tmp_path / "trained"))
    held_out = open_sources([SourceConfig(path=str(root / "split"))])
    warn_of_known(held_out, [trained_on])
    assert "validation: 3 of the 5 samples of its data sets are trained on" in caplog.text
    caplog.clear()
    write_split(tmp_path / "images", CAPTIONS, kind="image")
    warn_of_known(held_out, [SourceConfig(path=str(tmp_path / "images"))])
    warn_of_known(held_out, [SourceConfig(path="s3://bucket/split")])
    assert not caplog.records


# --- What is read of a result.


def test_a_folder_stands_for_its_result(run, tmp_path, capsys):
    run()
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    assert "the same as" in capsys.readouterr().out
    assert (tmp_path / "out/again/result.json").is_file()
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(tmp_path / "empty")]) == CONFIGURATION
    assert "empty/result.json cannot be read" in capsys.readouterr().err


LACKING = [
    ("retrieval", "split.num_captions"),
    ("retrieval", "metrics.vtm.text_to_video.recall_at_5"),
    ("retrieval", "chance.mean_rank"),
    ("retrieval", "checkpoint.path"),
    ("retrieval", "config"),
    ("question_answering", "metrics.by_type"),
    ("question_answering", "split.num_questions"),
    ("question_answering", "chance.answer"),
    ("recognition", "split.num_classes"),
    ("recognition", "split.digest"),
]


@pytest.fixture(scope="module")
def written(root):
    evaluate(evaluation(root, root / "split", out=root / "of/retrieval"))
    evaluate_answers(answers(root, root / "of/question_answering"))
    recognise(recognition(root, root / "of/recognition"))
    return root / "of"


@pytest.mark.parametrize(("task", "key"), LACKING)
def test_a_result_that_lacks_something_is_refused_by_one_message(written, tmp_path, capsys, task, key):
    result = json.loads((written / task / "result.json").read_text())
    *parents, last = key.split(".")
    part = result
    for name in parents:
        part = part[name]
    del part[last]
    (tmp_path / "result.json").write_text(json.dumps(result))
    for arguments in (["--table", str(tmp_path)], [str(tmp_path / "result.json")]):
        assert main(["evaluate", *arguments]) == CONFIGURATION
        shown = capsys.readouterr().err
        assert f"'{key}'" in shown
        assert "is no whole result of alpro evaluate" in shown
        assert shown.count("\n") == 1


def test_a_result_without_figures_or_of_an_unknown_task_is_refused(written, tmp_path, capsys):
    result = json.loads((written / "retrieval/result.json").read_text())
    for change, message in (({"metrics": {}}, "'metrics'"), ({"task": "x"}, "task=x: expected one of retrieval")):
        (tmp_path / "result.json").write_text(json.dumps({**result, **change}))
        assert main(["evaluate", "--table", str(tmp_path)]) == CONFIGURATION
        assert message in capsys.readouterr().err


def test_a_result_of_an_older_protocol_is_shown(written):
    result = json.loads((written / "retrieval/result.json").read_text())
    older = {**result, "protocol": {k: v for k, v in result["protocol"].items() if k not in ("mode", "top_k")}}
    assert "mode: None != 'exact'" in results_table({"new": result, "old": older})


def test_rows_of_a_table_are_compared_with_the_first_of_their_score(written):
    both = json.loads((written / "retrieval/result.json").read_text())
    vtc_protocol = {**both["protocol"], "mode": None}
    vtc = {**both, "metrics": {"vtc": both["metrics"]["vtc"]}, "protocol": vtc_protocol}
    assert "unlike" not in results_table({"vtc": vtc, "both": both, "again": both})
    reranked = {**both, "protocol": {**both["protocol"], "mode": "rerank", "top_k": 2}}
    assert "[1] unlike the first: mode: 'rerank' != 'exact'" in results_table({"v": vtc, "b": both, "r": reranked})


@pytest.mark.parametrize("task", ["question_answering", "recognition"])
def test_shares_of_another_split_have_a_note(written, task):
    result = json.loads((written / task / "result.json").read_text())
    other = {**result, "split": {**result["split"], "digest": "0" * 64}}
    assert "unlike" not in shares_table({"a": result, "b": result})
    assert "[1] unlike the first: split: '000000000000" in shares_table({"a": result, "b": other})


def digests_of_questions(root, tmp_path, *splits):
    return [evaluate_answers(answers(root, tmp_path / "out", sources=[{"path": s}]))["split"]["digest"] for s in splits]


def test_the_digest_of_questions_is_that_of_what_is_asked(root, tmp_path):
    write_answerable(tmp_path / "same", (1, 2))
    write_answerable(tmp_path / "fewer", (2,))
    one, same, fewer = digests_of_questions(root, tmp_path, root / "questions", tmp_path / "same", tmp_path / "fewer")
    assert one == same != fewer


def test_the_digest_of_recognition_is_that_of_videos_and_classes(root, tmp_path):
    write_split(tmp_path / "same", CAPTIONS, name="000009")
    write_split(tmp_path / "other", [*CAPTIONS[:4], ["a red dog moves"]])
    classes = [own[0] for own in CAPTIONS]
    (tmp_path / "more.txt").write_text("\n".join([*classes, "house"]))
    changes = [
        {},
        {"sources": [{"path": tmp_path / "same"}]},
        {"sources": [{"path": tmp_path / "other"}]},
        {"classes": tmp_path / "more.txt"},
    ]
    one, same, *others = (
        recognise(recognition(root, tmp_path / "out", **change))["split"]["digest"] for change in changes
    )
    assert one == same
    assert len({one, *others}) == 3


# --- Progress.


def test_encoders_say_how_far_they_are(root, monkeypatch, caplog, run):
    caplog.set_level("INFO", "alpro_stream.evaluate")
    monkeypatch.setattr(progress, "_TELL_EVERY_S", -1.0)
    run(scores=["vtc"])
    assert "videos: 4 of 5 of this rank, " in caplog.text
    assert "texts: 4 of 5 of this rank, " in caplog.text


def test_equal_parts_and_the_rest(monkeypatch, caplog):
    caplog.set_level("INFO", "alpro_stream.evaluate")
    assert list(progress.in_parts("abcde", 2, "letters")) == ["ab", "cd", "e"]
    assert list(progress.in_parts("ab", 0, "letters")) == ["a", "b"]
    assert not caplog.records  # It was quick.


def test_texts_are_encoded_in_parts(root):
    trained = load_trained(root / "model", torch.device("cpu"))
    tokenizer = Tokenizer(str(root / "tokenizer"), 12)
    texts = [own[0] for own in CAPTIONS]
    whole, parts = (embed_texts(trained.dual, texts, tokenizer, size) for size in (5, 2))
    torch.testing.assert_close(parts.feature_CE, whole.feature_CE)
