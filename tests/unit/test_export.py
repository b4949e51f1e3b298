"""`alpro export` and `alpro answer`: a model's way out, and a released file's way in."""

import json
import re
from pathlib import Path

import pytest
import torch

from alpro_launch.cli import main
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.words import load_words
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.model.folder import LoadedModel, ModelDescription
from alpro_stream.model.reference_names import to_reference
from alpro_stream.model.weight_files import read_tensors
from alpro_stream.pretrained import Alpro
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import write_tokenizer

IMAGE = next(iter(sorted(Path("examples/clips/images").iterdir())))
MODEL = {
    "video": {"image_size": 32, "patch_size": 16, "width": 64, "depth": 1, "num_heads": 1, "num_frames": 2},
    "text": {"width": 64, "num_layers": 1, "num_multimodal_layers": 1, "num_heads": 1, "intermediate_size": 64},
    "projection_size": 16,
}


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def make(tokenizer, task, video=None, text=None, **lists):
    words = Tokenizer(str(tokenizer), 30)
    sizes = {**MODEL, "video": {**MODEL["video"], **(video or {})}, "text": {**MODEL["text"], **(text or {})}}
    values = {"task": task, "model": sizes, "vocab_size": words.vocab_size, "num_tokens": 30, **lists}
    description = validate(ModelDescription, values, source="test")
    torch.manual_seed(0)
    return Alpro(LoadedModel(description, description.build(), words))


def released(tokenizer, path, task, **lists):
    """A file as the authors release it, and the model in it."""
    model = make(tokenizer, task, **lists)
    torch.save(to_reference(model.model.state_dict(), task, 1), path)
    return model


def test_a_folder_becomes_a_file_for_the_authors_code_and_comes_back(tmp_path, tokenizer, capsys):
    model = make(tokenizer, "retrieval")
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out.pt"), "--format", "authors"]) == 0
    assert "itm_head.weight" in read_tensors(tmp_path / "out.pt")
    assert main(["export", str(tmp_path / "out.pt"), str(tmp_path / "again"), "--tokenizer", str(tokenizer)]) == 0
    assert "loaded" in capsys.readouterr().out
    again = Alpro.from_pretrained(tmp_path / "again", device="cpu")
    assert again.description == model.description
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_a_released_answering_file_answers(tmp_path, tokenizer, capsys):
    released(tokenizer, tmp_path / "qa.pt", "question_answering", answers=["a", "b", "c"])
    (tmp_path / "answers.json").write_text(json.dumps({"red": 1, "blue": 0}))
    arguments = ["--tokenizer", str(tokenizer), "--answers", str(tmp_path / "answers.json")]
    assert main(["export", str(tmp_path / "qa.pt"), str(tmp_path / "qa"), *arguments]) == 0
    assert Alpro.from_pretrained(tmp_path / "qa").description.answers == ("blue", "red", "")
    capsys.readouterr()
    assert main(["answer", str(IMAGE), "what moves", "--model", str(tmp_path / "qa"), "--top", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in lines) == ["blue", "red"]


def test_a_released_pretraining_file_takes_the_first_words_of_its_entities(tmp_path, tokenizer):
    released(tokenizer, tmp_path / "pretrain.pt", "pretrain", entities=["dog", "cat"])
    (tmp_path / "entities.txt").write_text("dog 31\ncat 20\nbird 7\n")
    arguments = ["--tokenizer", str(tokenizer), "--entities", str(tmp_path / "entities.txt")]
    assert main(["export", str(tmp_path / "pretrain.pt"), str(tmp_path / "out"), *arguments]) == 0
    assert Alpro.from_pretrained(tmp_path / "out").description.entities == ("dog", "cat")


def test_an_answering_file_trained_in_lavis_has_no_projections(tmp_path, tokenizer, capsys):
    model = make(tokenizer, "question_answering", answers=["a", "b"])
    named = to_reference(model.model.state_dict(), "question_answering", 1)
    unused = ("temp", "vision_proj", "text_proj")
    plain = {name: tensor for name, tensor in named.items() if not name.startswith(unused)}
    torch.save({"model": plain, "epoch": 3}, tmp_path / "lavis.pth")
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    arguments = ["--tokenizer", str(tokenizer), "--answers", str(tmp_path / "answers.txt")]
    assert main(["export", str(tmp_path / "lavis.pth"), str(tmp_path / "qa"), *arguments]) == 0
    assert "5 start fresh" in capsys.readouterr().out
    expected = model.answer(IMAGE, "what")
    found = Alpro.from_pretrained(tmp_path / "qa", device="cpu").answer(IMAGE, "what")
    assert [answer.probability for answer in found] == [answer.probability for answer in expected]


def test_sizes_and_task_of_a_released_file_can_be_changed(tmp_path, tokenizer):
    released(tokenizer, tmp_path / "pretrain.pt", "pretrain", entities=["dog", "cat"])
    options = ["--tokenizer", str(tokenizer), "--task", "retrieval", "--num-tokens", "20"]
    source, out = str(tmp_path / "pretrain.pt"), tmp_path / "retrieval"
    assert main(["export", source, str(out), *options, "video.num_frames=4", "video.image_size=64"]) == 0
    description = Alpro.from_pretrained(out).description
    assert (description.task, description.num_tokens) == ("retrieval", 20)
    assert (description.model.video.num_frames, description.model.video.image_size) == (4, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "brings no tokenizer"),
        (["--tokenizer", "{}"], "2 outputs and 0 entities.*--task retrieval"),
        (["--tokenizer", "{}", "--prompter"], "no prompter"),
        (["--tokenizer", "{}", "--task", "question_answering"], "answers"),
        (["--tokenizer", "{}", "--task", "retrieval", "video.num_frame=4"], "num_frames"),
        (["--tokenizer", "{}", "--task", "retrieval", "video.image_size=40"], "multiple of patch_size"),
        (["--tokenizer", "{}", "--task", "retrieval", "video.width=128", "text.width=128"], "has shape"),
        (["--tokenizer", "nothing/there/at/all"], "no tokenizer at"),
        (["--tokenizer", "{}", "--task", "retrieval", "--num-tokens", "600"], "num_tokens 600 .* 512 positions"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path, tokenizer, capsys, options, words):
    released(tokenizer, tmp_path / "pretrain.pt", "pretrain", entities=["dog", "cat"])
    given = [option.format(tokenizer) for option in options]
    assert main(["export", str(tmp_path / "pretrain.pt"), str(tmp_path / "out"), *given]) == CONFIGURATION
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_folders_take_no_options(tmp_path, tokenizer, capsys):
    make(tokenizer, "retrieval").save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    assert main(["export", source, source]) == CONFIGURATION
    assert "exists" in capsys.readouterr().err
    assert main(["export", source, str(tmp_path / "out"), "--tokenizer", str(tokenizer)]) == CONFIGURATION
    assert "--tokenizer: for a released file only" in capsys.readouterr().err
    assert main(["answer", str(IMAGE), "what", "--model", source]) == CONFIGURATION
    assert "cannot answer" in capsys.readouterr().err


def test_lists_of_words(tmp_path):
    def words(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return load_words(path)

    assert words("a.txt", "dog\n cat \n\nred car\n") == ["dog", "cat", "red car"]
    assert words("b.json", '["dog", "cat"]') == ["dog", "cat"]
    assert words("c.json", '{"cat": 1, "dog": 0}') == ["dog", "cat"]
    assert words("d.json", '{"format_version": 1, "entities": [{"word": "dog", "count": 3}]}') == ["dog"]
    assert load_words(None) == []
    assert words("f.txt", "hot dog 31\ncat\t7\n") == ["hot dog", "cat"]
    assert words("g.txt", "formula 1\ncar\n2\n") == ["formula 1", "car", "2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "no list of words"),
        ('"ab"', "no list of words"),
        ('{"red": 5, "blue": 9}', "numbers are not 0 to 1"),
        ('{"red": 1, "blue": 1}', "numbers are not 0 to 1"),
        ('["a", "a"]', "'a' more than once"),
        ('["man", "boy", "Man"]', "'man' more than once.*remove one"),
        ('["a", ""]', "'' is in it"),
        ('[["a"]]', "is in it"),
    ],
)
def test_a_list_that_cannot_be_the_outputs_of_a_head_is_refused(tmp_path, text, problem):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_words(tmp_path / "words.json")


def test_what_weights_do_not_tell_is_said_on_the_way_out_and_in(tmp_path, tokenizer, capsys):
    model = make(tokenizer, "retrieval", video={"num_heads": 2}, text={"num_heads": 2, "num_multimodal_layers": 3})
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out.pt"), "--format", "authors"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to read it back")]
    sizes = line.partition(": ")[2].split()
    assert {"video.num_heads=2", "text.num_heads=2", "text.num_layers=1"} <= set(sizes)
    arguments = ["--tokenizer", str(tokenizer), *sizes]
    assert main(["export", str(tmp_path / "out.pt"), str(tmp_path / "again"), *arguments]) == 0
    assert "assumed" in capsys.readouterr().out
    again = Alpro.from_pretrained(tmp_path / "again", device="cpu")
    assert again.description == model.description
    assert torch.equal(again.match(IMAGE, "a red dog"), model.match(IMAGE, "a red dog"))
