"""The answers that a run chooses from: counted, or from a file."""

import json
import logging

import pytest
from answer_files import write_questions

from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate.answer_list import (
    AnswersConfig,
    answer_list,
    check_questions,
    count_answers,
    most_frequent,
)
from alpro_stream.stream.sources import SourceConfig, open_sources, read_listings

# Of two shards; "cat" and "dog" tie, and so do the three that come once.
SHARDS = [
    [[("what?", "Cat"), ("who?", "man")], [("what?", "dog")], []],
    [[("what?", "cat"), ("where?", "zoo"), ("what?", "dog ")], [("how many?", "2")]],
]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "train", SHARDS)


def sources_of(split, **config):
    return open_sources([SourceConfig(path=str(split), **config)], "question")


def listed(split, **config):
    return answer_list(AnswersConfig(**config), sources_of(split))


def test_the_most_frequent_come_first_and_ties_by_the_alphabet(split):
    counts = count_answers(sources_of(split))
    assert counts == {"cat": 2, "dog": 2, "man": 1, "zoo": 1, "2": 1}
    assert most_frequent(counts, 10) == ["cat", "dog", "2", "man", "zoo"]
    assert listed(split, num=3) == ["cat", "dog", "2"]


def test_excluded_samples_answer_nothing(split, tmp_path):
    (tmp_path / "exclude.txt").write_text("video-00003\n")
    counts = count_answers(sources_of(split, exclude=str(tmp_path / "exclude.txt")))
    assert counts == {"cat": 1, "man": 1, "dog": 1, "2": 1}


def test_a_damaged_sample_answers_nothing_and_ends_nothing(split, tmp_path):
    damaged = tmp_path / "train"
    damaged.mkdir()
    for file in split.iterdir():
        data = file.read_bytes()
        (damaged / file.name).write_bytes(data.replace(b'"answer": "Cat"', b'"answer"! "Cat"'))
    assert count_answers(sources_of(damaged)) == {"cat": 1, "dog": 2, "zoo": 1, "2": 1}


def test_it_says_how_much_the_list_covers_and_that_there_are_fewer(split, caplog):
    caplog.set_level(logging.INFO, "alpro_stream.evaluate.answer_list")
    listed(split, num=2)
    assert "2 of the 5 answers of the training questions, right for 4 of 7 questions (57.1 %)" in caplog.text
    assert "all are taken" not in caplog.text
    assert len(listed(split)) == 5
    assert "answers.num=1500: the training questions have 5, all are taken" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "zoo\nDog\n"), ("a.json", json.dumps(["zoo", "Dog"])), ("ans2label.json", '{"Dog": 1, "zoo": 0}')],
)
def test_a_file_is_taken_as_it_is(split, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert listed(split, file=tmp_path / name, num=2) == ["zoo", "Dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog\nman\nDog\n", "'dog' more than once: each is an output of the model; remove one"),
        ("tiger\nlion\n", r"none of the 7 training questions has an answer of .*'cat'\); set answers.file=null"),
        ("dog\n", "has 1 answer, 'dog': nothing to choose"),
        ("", "none of the 7 training questions"),
    ],
)
def test_files_that_are_no_answer_lists(split, tmp_path, text, message):
    (tmp_path / "answers.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        listed(split, file=tmp_path / "answers.txt")


def test_a_file_that_is_not_there(split, tmp_path):
    with pytest.raises(ConfigError, match=r"is no list of words: .*No such file"):
        listed(split, file=tmp_path / "nothing.txt")


def test_data_without_a_question_are_refused(split, tmp_path):
    mute = write_questions(tmp_path / "train", [[[], []]])
    with pytest.raises(DataError, match=r"no question in .*train: .*Shard the corpus with them \(docs/manifests.md\)"):
        check_questions(read_listings([SourceConfig(path=str(mute))]), [str(mute)])
    check_questions(read_listings([SourceConfig(path=str(path)) for path in (mute, split)]), [])
