"""A whole evaluation of question answering on a small model: what it counts, says of itself, and refuses."""

import json

import pytest
import torch
from answer_files import write_answerable, write_questions
from retrieval_files import write_checkpoint

from alpro_launch.cli import main
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate import question_answering
from alpro_stream.evaluate.aggregate import aggregate
from alpro_stream.evaluate.embed import evenly_spread, pixels_of, stored_clips
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.question_answering import (
    AnswerEvaluateConfig,
    answer_questions,
    evaluate_answers,
    question_type,
)
from alpro_stream.evaluate.result import read_result
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.media import FrameConfig
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.folder import read_model, write_model
from alpro_stream.pretrained import Alpro
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.stream.text import Tokenizer

# Numbers 0 to 5 as `answer_files.about` has them: red, green, blue, yellow dogs, red and green cats.
ANSWERS = ("red", "green", "Cat", "dog")
NUM_QUESTIONS = 12


def write_answering(folder, split, answers=ANSWERS):
    """A question answering model with random weights and these answers, each of which it gives in the split."""
    loaded = read_model(write_checkpoint(folder.parent / "two", "question_answering"))
    description = loaded.description.model_copy(update={"answers": answers})
    torch.manual_seed(0)
    model = description.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = Tokenizer(str(folder.parent / "tokenizer"), 12)
    # A random model prefers one answer to all questions, and that by far: take the preference away.
    clips = stored_clips(open_sources([SourceConfig(path=str(split))]))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 32, None)
    logits = []
    hook = model.answer_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    how = Encoding(evenly_spread(2, FrameConfig()), decoder, tokenizer, batch_size=16)
    answer_questions(model.eval(), clips, answers, how)
    hook.remove()
    decoder.close()
    model.answer_head[-1].bias.data -= torch.cat(logits).mean(dim=0)
    write_model(folder, description, model.state_dict(), tokenizer)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    write_answerable(folder / "split", (4, 2))
    write_answering(folder / "model", folder / "split")
    return folder


def evaluation(root, out, **changes):
    values = {
        "task": "question_answering",
        "checkpoint": root / "model",
        "sources": [{"path": root / "split"}],
        "out": out,
        "batch_size": 5,
        "decode": {"num_workers": 0},
        **changes,
    }
    return validate(AnswerEvaluateConfig, values, source="test")


@pytest.fixture(scope="module")
def result(root):
    return evaluate_answers(evaluation(root, root / "out"))


@pytest.fixture
def run(root, tmp_path):
    return lambda **changes: evaluate_answers(evaluation(root, tmp_path / "out", **changes))


def given(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_types_go_by_the_first_word():
    asked = ("What is it?", "  who sings", "how many", "WHERE?", "when, then?", "is it a dog", "whatever", "")
    found = [question_type(question) for question in asked]
    assert found == ["what", "who", "how", "where", "when", "other", "other", "other"]


def test_the_result_counts_what_the_written_answers_say(root, result):
    assert read_result(root / "out") == json.loads(json.dumps(result))
    lines = given(root / "out")
    assert len(lines) == NUM_QUESTIONS
    assert len({line["given"] for line in lines}) >= 3
    assert {line["given"] for line in lines} <= set(ANSWERS)
    right = [line["given"].lower() == line["answer"] for line in lines]
    assert 0 < sum(right) < len(right)
    assert result["metrics"]["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    assert result["metrics"]["by_type"]["what"] == pytest.approx(result["metrics"]["accuracy"])
    assert result["metrics"]["by_type"]["who"] is None
    # Two samples are blue and yellow, which the model does not have.
    assert [line["listed"] for line in lines].count(False) == result["split"]["num_unlisted_answers"] == 2
    assert not any(one for one, line in zip(right, lines, strict=True) if not line["listed"])
    assert result["chance"]["accuracy"] == pytest.approx(100 * 2 / 12)
    assert result["chance"]["answer"] == "red"
    # Four of the six are dogs.
    assert result["chance"]["by_type"] == {
        "what": pytest.approx(100 * 4 / 12),
        **dict.fromkeys(("who", "how", "where", "when", "other")),
    }


def test_the_result_says_how_it_was_made(result):
    protocol, split = result["protocol"], result["split"]
    assert (protocol["num_frames"], protocol["num_tokens"], protocol["answers"]) == (2, 12, "the likeliest of 4")
    assert (split["num_questions"], split["num_videos"], split["num_by_type"]["what"]) == (12, 6, 12)
    assert result["checkpoint"]["task"] == "question_answering"
    assert len(result["checkpoint"]["weights_sha256"]) == 64


def test_answers_are_those_that_the_model_gives_to_one_question(root, result, tmp_path):
    """One video after the other by the interface for users, from the stored frames."""
    model = Alpro.from_pretrained(root / "model", device="cpu")
    clips = stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 2, None)
    answers = []
    for clip in clips:
        frames = pixels_of([clip], evenly_spread(2, FrameConfig()), decoder)[0]
        answers += [model.answer(frames, question, top=1)[0].text for question in clip.questions]
    decoder.close()
    assert answers == [line["given"] for line in given(root / "out")]


def test_each_video_is_encoded_once(run, monkeypatch):
    rows = []
    original = DualEncoder.encode_video
    monkeypatch.setattr(
        DualEncoder, "encode_video", lambda self, video: rows.append(len(video)) or original(self, video)
    )
    run()
    assert sum(rows) == 6


def test_clips_of_a_video_are_aggregated(run, result):
    whole = run(num_clips=1, batch_size=100)
    assert whole["metrics"] == result["metrics"]
    several = run(num_clips=3, aggregation="max")
    assert (several["protocol"]["num_clips"], several["protocol"]["aggregation"]) == (3, "max")
    assert several["split"] == result["split"]


@pytest.fixture(scope="module")
def logits_QAK(root):
    """Of each question and each of 3 clips of its video, by the interface for users, one clip after the other."""
    alpro = Alpro.from_pretrained(root / "model", device="cpu")
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 64, None)
    rows = []
    for clip in stored_clips(open_sources([SourceConfig(path=str(root / "split"))])):
        frames_THWC = pixels_of([clip], evenly_spread(6, FrameConfig()), decoder)[0]
        for question in clip.questions:
            rows.append(torch.stack([clip_logits(alpro, part, question) for part in frames_THWC.split(2)], dim=1))
    decoder.close()
    return torch.stack(rows)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_clips_are_answered_one_by_one_and_their_logits_put_together(root, logits_QAK, monkeypatch, how):
    seen = []

    def recording(logits_RAK, asked_how):
        assert asked_how == how
        seen.append(logits_RAK)
        return aggregate(logits_RAK, asked_how)

    monkeypatch.setattr(question_answering, "aggregate", recording)
    evaluate_answers(evaluation(root, root / "clips", num_clips=3, aggregation=how, batch_size=7))
    torch.testing.assert_close(torch.cat(seen), logits_QAK, rtol=1e-4, atol=1e-5)
    assert (logits_QAK[:, :, 0] - logits_QAK[:, :, 1]).abs().max() > 1e-3
    expected = [ANSWERS[number] for number in aggregate(logits_QAK, how).argmax(dim=1).tolist()]
    assert [line["given"] for line in given(root / "clips")] == expected


def clip_logits(alpro, frames_THWC, question):
    """Of the answer head, for one clip and one question."""
    seen = []
    hook = alpro.model.answer_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    alpro.answer(frames_THWC, question, top=1)
    hook.remove()
    return seen[0].detach()


def test_an_output_without_a_text_is_never_an_answer(root, tmp_path):
    write_answering(tmp_path / "model", root / "split", ("dog", "", "", "green"))
    evaluate_answers(evaluation(root, tmp_path / "out", checkpoint=tmp_path / "model"))
    assert {line["given"] for line in given(tmp_path / "out")} <= {"dog", "green"}


def test_videos_without_questions_are_left_out_and_counted(root, tmp_path):
    write_questions(tmp_path / "split", [[[("what moves", "dog")], []]])
    found = evaluate_answers(evaluation(root, tmp_path / "out", sources=[{"path": tmp_path / "split"}]))
    assert (found["split"]["num_videos"], found["split"]["num_videos_without_questions"]) == (1, 1)


def test_written_answers_may_be_left_out(run, tmp_path):
    run(keep_answers=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_a_split_without_a_question_is_refused(root, tmp_path):
    write_questions(tmp_path / "split", [[[], []]])
    with pytest.raises(DataError, match="2 videos and images, and no question: shard the split with its questions"):
        evaluate_answers(evaluation(root, tmp_path / "out", sources=[{"path": tmp_path / "split"}]))


def test_a_split_of_answers_that_the_model_does_not_have_is_refused(root, tmp_path):
    write_questions(tmp_path / "split", [[[("who?", "man"), ("what?", "piano")], [("who?", "man")]]])
    message = r"none of the 3 questions has one of the 4 answers of .*'man', the model's first 'red'. Was it trained"
    with pytest.raises(DataError, match=message):
        evaluate_answers(evaluation(root, tmp_path / "out", sources=[{"path": tmp_path / "split"}]))


@pytest.mark.parametrize("task", ["retrieval", "prompter"])
def test_a_model_of_another_task_is_refused(root, tmp_path, task):
    write_checkpoint(tmp_path / "model", task)
    with pytest.raises(ConfigError, match=f"was trained for {task}: it has no answers .* or task=retrieval"):
        evaluate_answers(evaluation(root, tmp_path / "out", checkpoint=tmp_path / "model"))


@pytest.fixture(scope="module")
def config(root):
    path = root / "evaluate.yaml"
    sources = f"sources: [{{path: {root / 'split'}}}]"
    path.write_text(f"task: question_answering\ncheckpoint: {root / 'model'}\n{sources}\nout: {root / 'cli'}\n")
    return path


def test_the_command_prints_figures_and_makes_them_again(root, config, result, capsys):
    assert main(["evaluate", str(config)]) == 0
    printed = capsys.readouterr().out
    assert f"all               12 {result['metrics']['accuracy']:6.2f}%" in printed
    assert "always 'red': 16.67%" in printed
    assert "2 questions whose answer the model does not have count as wrong" in printed
    assert main(["evaluate", str(root / "cli/result.json")]) == 0
    assert "the same as" in capsys.readouterr().out


def test_results_stand_beside_each_other(root, config, result, run, tmp_path, capsys):
    run(num_clips=2)
    paths = [str(root / "out"), str(tmp_path / "out")]
    assert main(["evaluate", "--table", *paths]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "[1] unlike the first: aggregation: 'mean' != None; num_clips: 2 != 1" in printed
    other = {**read_result(tmp_path / "out"), "task": "recognition"}
    (tmp_path / "other.json").write_text(json.dumps(other))  # refused before its figures are looked at
    assert main(["evaluate", "--table", paths[0], str(tmp_path / "other.json")]) == CONFIGURATION
    assert "results of several tasks have no table in common" in capsys.readouterr().err


def test_an_unknown_task_is_named(config, capsys):
    assert main(["evaluate", str(config), "task=captioning"]) == CONFIGURATION
    assert "task=captioning: expected one of retrieval, question_answering, " in capsys.readouterr().err
