"""A model as a folder: what is written is what is read, and damage is named."""

import json
import shutil

import pytest
import torch
from model_files import TASKS, assert_equal_parameters, make_model, model_config
from safetensors.torch import save_file

from alpro_stream.errors import CheckpointError, TokenizerError
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.folder import LoadedModel, ModelDescription, read_description, read_model, write_model
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import write_tokenizer

ENTITIES, ANSWERS = ("dog", "猫", "car", "tree", "boat"), ("yes", "no", "")
TEXTS = ["a red dog moves", "a blue boat moves"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), 12)


def make(task, tokenizer):
    description = ModelDescription(
        task=task,
        model=model_config(),
        vocab_size=tokenizer.vocab_size,
        num_tokens=12,
        entities=ENTITIES if task == "pretrain" else (),
        answers=ANSWERS if task == "question_answering" else (),
    )
    return LoadedModel(description, make_model(task, tokenizer.vocab_size), tokenizer)


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """A pre-trained model and its folder; tests change copies of it."""
    made, folder = make("pretrain", tokenizer), tmp_path_factory.mktemp("model") / "deeper" / "folder"
    write_model(folder, made.description, made.model.state_dict(), tokenizer)
    return made, folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written[1], tmp_path / "model")
    return tmp_path / "model"


def outputs_of(loaded):
    """Everything that a model of its task can say about two clips and two texts."""
    ids_BL, mask_BL = loaded.tokenizer(TEXTS)
    tokens_BND, video_BE = loaded.dual.encode_video(torch.randn(2, 2, 3, 32, 32, generator=torch.manual_seed(3)))
    text_BLD, text_BE = loaded.dual.encode_text(ids_BL, mask_BL)
    outputs = [video_BE, text_BE, loaded.dual.temperature()]
    if isinstance(loaded.model, DualEncoder):
        return outputs
    fused_BSD = loaded.model.multimodal(text_BLD, mask_BL, tokens_BND)
    heads = [loaded.model.vtm_head, loaded.model.mlm_head, loaded.model.pem_head, loaded.model.answer_head]
    return outputs + [head(fused_BSD) for head in heads if head is not None]


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_what_is_read_equals_what_was_written(tmp_path, tokenizer, task):
    made = make(task, tokenizer)
    write_model(tmp_path, made.description, made.model.state_dict(), tokenizer)
    loaded = read_model(tmp_path)
    assert loaded.description == made.description
    assert loaded.tokenizer.digest == tokenizer.digest
    assert not loaded.model.training
    assert_equal_parameters(loaded.model.state_dict(), made.model.state_dict())
    found, expected = outputs_of(loaded), outputs_of(made)
    assert len(found) == {"prompter": 3, "pretrain": 6, "retrieval": 4, "question_answering": 4}[task]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_files_of_a_folder(folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer"}
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (values["format_version"], values["task"], values["num_tokens"]) == (1, "pretrain", 12)
    assert values["entities"] == list(ENTITIES)
    # Readable for people, too.
    assert "猫" in (folder / "config.json").read_text(encoding="utf-8")
    assert values["model"]["video"]["width"] == 64


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entitys": []}, r"unknown key 'entitys'; did you mean 'entities'\?; is this a model of alpro-stream\?"),
        ({"format_version": 2}, r"'format_version': .*1.*\(got 2\)"),
        ({"num_tokens": 17}, r"num_tokens 17 is more than the 16 positions .*model\.text\.max_positions"),
        ({"num_tokens": 2}, r"'num_tokens': .*\(got 2\)"),
        ({"task": "captioning"}, r"'task': .*\(got 'captioning'\)"),
        ({"model": {"video": {"widht": 64}}}, r"unknown key 'model\.video\.widht'; did you mean 'width'\?"),
        ({"vocab_size": None}, r"'vocab_size': .*\(got None\)"),
    ],
)
def test_a_config_that_is_not_of_this_program_is_refused(folder, values, message):
    change(folder, **values)
    for read in (read_description, read_model):
        with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
            read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json cannot be read: .*No such file"),
        (b"", r"config\.json cannot be read"),
        (b'{"task": "pret', r"config\.json cannot be read"),
        (b"\xff\xfe{}", r"config\.json cannot be read"),
        (b"[1, 2]", r"config\.json: 'the file'.*is this a model of alpro-stream\?"),
        (b"{}", r"config\.json: 'task' is required and not set; .*'vocab_size' is required"),
        (b'{"architectures": ["BertModel"]}', r"unknown key 'architectures'.*is this a model of alpro-stream\?"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(folder, content, message):
    path = folder / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_description(folder)


def test_a_tokenizer_of_another_size_is_refused(folder, tokenizer):
    vocabulary = folder / "more"
    write_tokenizer(vocabulary)
    with (vocabulary / "vocab.txt").open("a") as file:
        file.write("zebra\nzoo\n")
    shutil.rmtree(folder / "tokenizer")
    Tokenizer(str(vocabulary), 12).save(folder / "tokenizer")
    knows, rows = tokenizer.vocab_size + 2, tokenizer.vocab_size
    with pytest.raises(CheckpointError, match=rf"tokenizer knows {knows} words and word_embeddings.* has {rows} rows"):
        read_model(folder)


def test_a_missing_tokenizer_is_named(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*model/tokenizer"):
        read_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"entities": list(ENTITIES[:4])},
            r"pem_head\.2\.bias has shape \(5,\) and the model expects \(4,\)",
        ),
        ({"entities": []}, r"no place for pem_head\.0\.bias"),
        ({"task": "retrieval", "entities": []}, r"no place for mlm_head\.bias"),
        ({"task": "question_answering", "answers": ["a"]}, r"no place for mlm_head\.bias"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(folder, values, message):
    change(folder, **values)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_model(folder)


def test_missing_and_damaged_weights_are_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        read_model(folder)
    save_file({"vtm_head.bias": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* not in it"):
        read_model(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such weights file"):
        read_model(folder)
