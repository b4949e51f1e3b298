"""Files of the authors' code and of LAVIS as models of ours."""

import pytest
import torch
from model_files import (
    NUM_ANSWERS,
    NUM_ENTITIES,
    TASKS,
    assert_equal_parameters,
    make_model,
    model_config,
    parameters_of,
    their_tensors,
)

from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.model.foreign import load_foreign, open_foreign
from alpro_stream.model.loading import nearest_frames
from alpro_stream.model.reference_names import to_reference
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import write_tokenizer

WORDS = {
    "entities": [f"entity {i}" for i in range(NUM_ENTITIES)],
    "answers": [f"answer {i}" for i in range(NUM_ANSWERS)],
}
"""As many as the models have; a model takes the list that it has a head for."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), 12)


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A model of every task, and a file of it."""
    root, found = tmp_path_factory.mktemp("files"), {}
    for task in TASKS:
        model = make_model(task, tokenizer.vocab_size)
        torch.save(their_tensors(model, task), root / f"{task}.pt")
        found[task] = model, root / f"{task}.pt"
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_file_becomes_the_model_it_was_made_from(files, tokenizer, task):
    model, path = files[task]
    file = open_foreign(path)
    assert (file.task, file.vocab_size) == (task, tokenizer.vocab_size)
    assert file.config() == model.config
    loaded, report = load_foreign(file, tokenizer, **WORDS)
    assert_equal_parameters(loaded.model.state_dict(), model.state_dict())
    assert not loaded.model.training
    assert set(report.loaded) == model.state_dict().keys()
    assert (report.resized, report.missing) == ((), ())
    description = loaded.description
    assert (description.task, description.vocab_size, description.num_tokens) == (task, tokenizer.vocab_size, 12)
    assert description.entities == (tuple(WORDS["entities"]) if task == "pretrain" else ())
    assert description.answers == (tuple(WORDS["answers"]) if task == "question_answering" else ())
    video = torch.randn(1, 2, 3, 32, 32)
    own_dual = model if task == "prompter" else model.dual
    assert torch.equal(loaded.dual.video_feature(video), own_dual.video_feature(video))


def test_sizes_are_read_off_the_weights(tmp_path):
    video = {"image_size": 24, "patch_size": 8, "num_frames": 3, "width": 128, "depth": 3, "num_heads": 2}
    text = {"width": 128, "num_layers": 2, "num_multimodal_layers": 3, "num_heads": 2, "max_positions": 20}
    config = model_config(video={**video, "mlp_ratio": 1.5}, text=text, projection_size=24)
    model = make_model("retrieval", 9, config)
    torch.save(their_tensors(model, "retrieval"), tmp_path / "file.pt")
    assert open_foreign(tmp_path / "file.pt").config() == model.config


def test_another_number_of_frames_resizes_the_time_embeddings(files, tokenizer):
    model, path = files["retrieval"]
    loaded, report = load_foreign(open_foreign(path), tokenizer, overrides=["video.num_frames=8"])
    assert loaded.description.model.video.num_frames == 8
    assert report.resized == ("dual.video_encoder.time_embed (1, 2, 64) -> (1, 8, 64)",)
    taken = nearest_frames(model.dual.video_encoder.time_embed, 8)
    assert torch.equal(loaded.dual.video_encoder.time_embed, taken)
    expected = {**parameters_of(model), "dual.video_encoder.time_embed": taken}
    assert_equal_parameters(loaded.model.state_dict(), expected)
    assert loaded.dual.encode_video(torch.randn(1, 8, 3, 32, 32))[0].shape == (1, 5, 64)


def test_another_image_size_resizes_the_position_embeddings(files, tokenizer):
    _, path = files["retrieval"]
    loaded, report = load_foreign(open_foreign(path), tokenizer, overrides=["video.image_size=64"])
    assert report.resized == ("dual.video_encoder.pos_embed (1, 5, 64) -> (1, 17, 64)",)
    assert loaded.dual.encode_video(torch.randn(1, 2, 3, 64, 64))[0].shape == (1, 17, 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("video.num_frame=8", r"unknown key 'video\.num_frame'; did you mean 'num_frames'\?"),
        ("vidoe.num_frames=8", r"unknown key 'vidoe'; did you mean 'video'\?"),
        ("video.num_frames=many", r"'video\.num_frames': .*got 'many'"),
        ("video.num_heads=3", "width 64 is not a multiple of num_heads 3"),
        ("text.width=128", r"video\.width 64 and text\.width 128 differ"),
        ("video.num_frames", "is not of the form key.path=value"),
    ],
)
def test_an_override_that_cannot_be_used(files, tokenizer, override, message):
    _, path = files["retrieval"]
    with pytest.raises(ConfigError, match=message):
        load_foreign(open_foreign(path), tokenizer, overrides=[override])


@pytest.mark.parametrize("override", ["video.depth=3", "video.depth=1", "text.num_layers=2", "video.patch_size=8"])
def test_an_override_against_the_weights_is_refused(files, tokenizer, override):
    _, path = files["retrieval"]
    with pytest.raises(CheckpointError, match=r"retrieval\.pt: .*(not in it|no place for|has shape)"):
        load_foreign(open_foreign(path), tokenizer, overrides=[override])


@pytest.mark.parametrize("count", [0, 1, NUM_ENTITIES - 1])
def test_too_few_entities_are_refused_with_both_numbers(files, tokenizer, count):
    _, path = files["pretrain"]
    with pytest.raises(CheckpointError, match=rf"pem_head\.2\.bias has 5 outputs and {count} entities were given"):
        load_foreign(open_foreign(path), tokenizer, entities=WORDS["entities"][:count])


@pytest.mark.parametrize("answers", [[], ["a", "b", "c", "d"]])
def test_no_answers_and_too_many_are_refused_with_both_numbers(files, tokenizer, answers):
    _, path = files["question_answering"]
    message = rf"answer_head\.2\.bias has 3 outputs and {len(answers)} answers were given"
    with pytest.raises(CheckpointError, match=message):
        load_foreign(open_foreign(path), tokenizer, answers=answers)


def test_the_first_of_too_many_entities_count_and_outputs_without_an_answer_stay_empty(files, tokenizer):
    _, path = files["pretrain"]
    loaded, _ = load_foreign(open_foreign(path), tokenizer, entities=[*WORDS["entities"], "one more"])
    assert loaded.description.entities == tuple(WORDS["entities"])
    _, path = files["question_answering"]
    loaded, _ = load_foreign(open_foreign(path), tokenizer, answers=["yes", "no"])
    assert loaded.description.answers == ("yes", "no", "")
    assert loaded.model.answer_logits(torch.randn(1, 64)).shape == (1, 3)


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(files, tokenizer, tmp_path):
    model = make_model("retrieval", tokenizer.vocab_size + 7)
    torch.save(their_tensors(model, "retrieval"), tmp_path / "file.pt")
    knows, rows = tokenizer.vocab_size, tokenizer.vocab_size + 7
    message = rf"file\.pt: the tokenizer knows {knows} words and word_embeddings\.weight has {rows} rows"
    with pytest.raises(CheckpointError, match=message):
        load_foreign(open_foreign(tmp_path / "file.pt"), tokenizer)


@pytest.mark.parametrize(
    "names",
    [
        ("cls_token", "pos_embed", "blocks.0.attn.qkv.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
        ("dual.video_encoder.cls_token", "dual.raw_temperature", "vtm_head.bias"),
    ],
    ids=["ViT", "BERT", "ours"],
)
def test_a_file_of_another_program_is_refused(tmp_path, names):
    torch.save(dict.fromkeys(names, torch.ones(1)), tmp_path / "file.pt")
    message = rf"file\.pt holds {len(names)} tensors that begin with '{names[0]}': these are not the names"
    with pytest.raises(CheckpointError, match=message):
        open_foreign(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("visual_encoder.model.pos_embed", r"visual_encoder\.model\.pos_embed is not among the weights"),
        ("vision_proj.weight", r"dual\.video_projection\.weight not in it"),
        ("vision_proj.bias", r"dual\.video_projection\.bias not in it"),
        ("itm_head.bias", r"vtm_head\.bias not in it"),
        (
            "text_encoder.bert.embeddings.word_embeddings.weight",
            r"embeddings\.word_embeddings\.weight is not among the weights",
        ),
    ],
)
def test_a_file_with_a_hole_names_it(tmp_path, files, tokenizer, gone, message):
    tensors = their_tensors(files["retrieval"][0], "retrieval")
    del tensors[gone]
    torch.save(tensors, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        load_foreign(open_foreign(tmp_path / "file.pt"), tokenizer)


def test_a_pretraining_file_used_for_retrieval(files, tokenizer):
    model, path = files["pretrain"]
    loaded, report = load_foreign(open_foreign(path), tokenizer, task="retrieval")
    assert (loaded.description.task, loaded.description.entities) == ("retrieval", ())
    own = model.state_dict()
    expected = {name: tensor for name, tensor in own.items() if not name.startswith(("mlm_head.", "pem_head."))}
    assert_equal_parameters(loaded.model.state_dict(), expected)
    assert loaded.model.mlm_head is None
    assert {"mpm_head.0.weight", "text_encoder.cls.predictions.bias"} <= set(report.skipped)


def test_a_file_used_for_what_it_cannot_do_names_the_missing_head(files, tokenizer):
    _, path = files["retrieval"]
    with pytest.raises(ConfigError, match="chooses from a list of answers, which is empty"):
        load_foreign(open_foreign(path), tokenizer, task="question_answering")
    with pytest.raises(CheckpointError, match=r"mlm_head\.bias, mlm_head\.dense\.weight, .* not in it"):
        load_foreign(open_foreign(path), tokenizer, task="pretrain")


def test_a_prompter_that_we_wrote_under_their_names_comes_back_whole(tmp_path, tokenizer):
    """It has the lower half of the BERT alone, where theirs have both."""
    config = model_config(text={"num_layers": 2})
    model = make_model("prompter", tokenizer.vocab_size, config)
    torch.save(to_reference(model.state_dict(), "prompter", 2), tmp_path / "ours.pt")
    loaded, _ = load_foreign(open_foreign(tmp_path / "ours.pt"), tokenizer)
    assert (loaded.description.task, loaded.description.model) == ("prompter", config)
    assert_equal_parameters(loaded.model.state_dict(), model.state_dict())


def test_the_prompter_inside_a_pretraining_file(files, tokenizer, tmp_path):
    prompter = make_model("prompter", tokenizer.vocab_size, seed=1)
    inside = {f"prompter.{name}": tensor for name, tensor in their_tensors(prompter, "prompter").items()}
    torch.save(their_tensors(files["pretrain"][0], "pretrain") | inside, tmp_path / "both.pt")
    file = open_foreign(tmp_path / "both.pt", prompter=True)
    loaded, _ = load_foreign(file, tokenizer)
    assert loaded.description.task == "prompter"
    assert_equal_parameters(loaded.model.state_dict(), prompter.state_dict())
    student, report = load_foreign(open_foreign(tmp_path / "both.pt"), tokenizer, **WORDS)
    assert_equal_parameters(student.model.state_dict(), files["pretrain"][0].state_dict())
    assert set(inside) <= set(report.skipped)
    with pytest.raises(CheckpointError, match="carries no prompter"):
        open_foreign(files["retrieval"][1], prompter=True)
