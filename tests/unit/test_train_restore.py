"""A trained model for another run: what is taken from which source, and what is refused."""

import shutil

import pytest
import torch
from model_files import assert_equal_parameters, parameters_of, their_tensors

from alpro_stream.config import validate
from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import ModelConfig, build_model
from alpro_stream.model.folder import write_model
from alpro_stream.run import RunConfig, train
from alpro_stream.shards.storage import file_digest
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL, tiny_run, write_corpus
from alpro_stream.testing.shards import write_tokenizer
from alpro_stream.train.checkpoint import latest_checkpoint
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.restore import describe_prompter, load_trained, model_folder, start_from_trained

CPU = torch.device("cpu")
HEADS = ("vtm_head", "mlm_head", "pem_head", "answer_head")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(corpus, run_dir, **changes):
    values = tiny_run(corpus, run_dir, {"train.max_steps": 1, **changes})
    return validate(RunConfig, values, source="test")


def pretrain_of(corpus, run_dir, prompter, **changes):
    stage_two = {"task": "pretrain", "prompter.checkpoint": str(prompter), "prompter.placement": "inline"}
    return run_of(corpus, run_dir, **{**stage_two, "losses.pem.threshold": 0.0, **changes})


@pytest.fixture(scope="module")
def prompter(corpus, tmp_path_factory):
    """Run directory of stage one."""
    run_dir = tmp_path_factory.mktemp("prompter")
    train(run_of(corpus, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def pretrained(corpus, prompter, tmp_path_factory):
    """Run directory of stage two, with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("pretrained")
    train(pretrain_of(corpus, run_dir, prompter, **{"train.max_steps": 2, "train.checkpoint_every": 1}))
    return run_dir


@pytest.fixture(scope="module")
def exported(pretrained, tmp_path_factory):
    """The model of stage two as a folder of its own."""
    folder, trained = tmp_path_factory.mktemp("exported") / "model", load_trained(pretrained, CPU)
    write_model(folder, trained.description, trained.model.state_dict(), trained.tokenizer)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer(str(corpus / "tokenizer"), 12)


def fresh(task, tokenizer, num_entities=0, config=None):
    torch.manual_seed(9)
    return build_model(task, config or ModelConfig.model_validate(TINY_MODEL), tokenizer.vocab_size, num_entities)


def changed_config(**video):
    return ModelConfig.model_validate({**TINY_MODEL, "video": {**TINY_MODEL["video"], **video}})


def names_of(parameters, *parts):
    return {name for name in parameters if name.startswith(parts)}


def expected_from(model, source, fresh_parts):
    """The source's parameters, but for the parts that stay as they are."""
    own = parameters_of(model)
    kept = names_of(own, *fresh_parts)
    return {name: tensor if name in kept else source[name] for name, tensor in own.items()}


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported"])
def test_a_pretraining_takes_everything_of_another_one_with_the_same_entities(pretrained, exported, tokenizer, kind):
    source = {"run": pretrained, "checkpoint": latest_checkpoint(pretrained), "exported": exported}[kind]
    trained = load_trained(source, CPU)
    entities = trained.description.entities
    assert len(entities) > 2
    model = fresh("pretrain", tokenizer, len(entities))
    report = start_from_trained(model, tokenizer, entities, source)
    assert_equal_parameters(model.state_dict(), trained.model.state_dict())
    assert (report.missing, report.skipped, report.resized) == ((), (), ())


@pytest.mark.parametrize("change", ["another order", "one fewer", "none"])
def test_the_entity_head_stays_fresh_for_other_entities(pretrained, tokenizer, change):
    trained = load_trained(pretrained, CPU)
    entities = trained.description.entities
    others = {"another order": entities[::-1], "one fewer": entities[:-1], "none": ()}[change]
    model = fresh("pretrain", tokenizer, len(others))
    source = trained.model.state_dict()
    expected = expected_from(model, source, ("pem_head",))
    report = start_from_trained(model, tokenizer, others, pretrained)
    assert_equal_parameters(model.state_dict(), expected)
    assert set(report.missing) == names_of(expected, "pem_head")
    assert set(report.skipped) == names_of(source, "pem_head")
    assert set(report.loaded) == names_of(source, "dual", "multimodal", "vtm_head", "mlm_head")


def test_of_a_prompter_the_encoders_are_taken(prompter, tokenizer):
    source = {f"dual.{name}": tensor for name, tensor in load_trained(prompter, CPU).model.state_dict().items()}
    model = fresh("pretrain", tokenizer, 4)
    expected = expected_from(model, source, ("multimodal", *HEADS))
    report = start_from_trained(model, tokenizer, ("a", "b", "c", "d"), prompter)
    assert_equal_parameters(model.state_dict(), expected)
    assert set(report.missing) == names_of(expected, "multimodal", *HEADS)
    assert report.skipped == ()


def test_a_prompter_takes_the_encoders_of_a_pretraining(pretrained, tokenizer):
    source = load_trained(pretrained, CPU).model
    model = fresh("prompter", tokenizer)
    report = start_from_trained(model, tokenizer, (), pretrained)
    assert_equal_parameters(model.state_dict(), source.dual.state_dict())
    assert report.missing == ()
    assert {name.partition(".")[0] for name in report.skipped} == {"multimodal", "vtm_head", "mlm_head", "pem_head"}


@pytest.mark.parametrize(
    ("theirs", "fresh_parts"),
    [
        ("pretrain", ("pem_head",)),
        ("retrieval", ("mlm_head", "pem_head")),
        ("question_answering", ("vtm_head", "mlm_head", "pem_head")),
        ("prompter", ("multimodal", *HEADS)),
    ],
)
def test_of_a_file_of_the_authors_whatever_there_is_is_taken(tokenizer, tmp_path, theirs, fresh_parts):
    lists = {"pretrain": {"num_entities": 4}, "question_answering": {"num_answers": 3}}.get(theirs, {})
    torch.manual_seed(1)
    other = build_model(theirs, ModelConfig.model_validate(TINY_MODEL), tokenizer.vocab_size, **lists)
    torch.save(their_tensors(other, theirs), tmp_path / "file.pt")
    prefix = "dual." if theirs == "prompter" else ""
    source = {f"{prefix}{name}": tensor for name, tensor in other.state_dict().items()}
    model = fresh("pretrain", tokenizer, 4)
    expected = expected_from(model, source, fresh_parts)
    report = start_from_trained(model, tokenizer, ("a", "b", "c", "d"), tmp_path / "file.pt")
    assert_equal_parameters(model.state_dict(), expected)
    assert set(report.missing) == names_of(expected, *fresh_parts)


def test_a_prompter_takes_the_encoders_of_a_file_of_the_authors(tokenizer, tmp_path):
    other = fresh("pretrain", tokenizer, 4)
    torch.save(their_tensors(other, "pretrain"), tmp_path / "file.pt")
    model = build_model("prompter", ModelConfig.model_validate(TINY_MODEL), tokenizer.vocab_size)
    start_from_trained(model, tokenizer, (), tmp_path / "file.pt")
    assert_equal_parameters(model.state_dict(), other.dual.state_dict())


def test_embeddings_of_positions_and_of_time_are_resized(pretrained, tokenizer):
    source = load_trained(pretrained, CPU).model.state_dict()
    model = fresh("pretrain", tokenizer, config=changed_config(num_frames=4, image_size=64))
    report = start_from_trained(model, tokenizer, (), pretrained)
    assert len(report.resized) == 2
    taken = source["dual.video_encoder.time_embed"][:, [0, 0, 1, 1]]
    assert torch.equal(model.dual.video_encoder.time_embed, taken)
    assert model.dual.video_encoder.pos_embed.shape == (1, 17, 32)
    assert torch.equal(model.vtm_head.weight, source["vtm_head.weight"])


def test_another_tokenizer_is_refused(pretrained, tokenizer, tmp_path):
    vocabulary = write_tokenizer(tmp_path / "tokenizer") / "vocab.txt"
    # As many words: only the digest tells.
    vocabulary.write_text(vocabulary.read_text().replace("moves", "moved"))
    other = Tokenizer(str(tmp_path / "tokenizer"), 12)
    assert other.vocab_size == tokenizer.vocab_size
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        start_from_trained(fresh("pretrain", other), other, (), pretrained)


def test_a_file_of_the_authors_with_another_vocabulary_is_refused(tokenizer, tmp_path):
    other = build_model("retrieval", ModelConfig.model_validate(TINY_MODEL), tokenizer.vocab_size + 1)
    tensors = their_tensors(other, "retrieval")
    torch.save(tensors, tmp_path / "file.pt")
    message = rf"knows {tokenizer.vocab_size} words and word_embeddings.weight has {tokenizer.vocab_size + 1} rows"
    with pytest.raises(CheckpointError, match=message):
        start_from_trained(fresh("pretrain", tokenizer), tokenizer, (), tmp_path / "file.pt")
    del tensors["text_encoder.bert.embeddings.word_embeddings.weight"]
    torch.save(tensors, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight"):
        start_from_trained(fresh("pretrain", tokenizer), tokenizer, (), tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("video", "text"),
    [
        ({"width": 16}, {"width": 16}),
        ({"depth": 3}, {}),
        ({"depth": 1}, {}),
        ({"patch_size": 8, "image_size": 24}, {}),
        ({}, {"num_layers": 2}),
        ({}, {"num_multimodal_layers": 2}),
        ({}, {"intermediate_size": 32}),
    ],
    ids=["width", "deeper", "shallower", "patch_size", "num_layers", "num_multimodal_layers", "intermediate_size"],
)
def test_encoders_of_another_size_are_refused_and_nothing_is_changed(pretrained, tokenizer, video, text):
    sizes = {name: {**TINY_MODEL[name], **changes} for name, changes in (("video", video), ("text", text))}
    model = fresh("pretrain", tokenizer, config=ModelConfig.model_validate({**TINY_MODEL, **sizes}))
    before = parameters_of(model)
    with pytest.raises(CheckpointError, match=r"(has shape|not in it|no place for)"):
        start_from_trained(model, tokenizer, (), pretrained)
    assert_equal_parameters(model.state_dict(), before)


def test_fewer_multimodal_layers_than_the_source_are_refused(corpus, tokenizer, tmp_path):
    deeper = {"losses.pem.weight": 0, "model.text.num_multimodal_layers": 2}
    train(run_of(corpus, tmp_path / "deeper", task="pretrain", **deeper))
    model = fresh("pretrain", tokenizer)
    with pytest.raises(CheckpointError, match=r"multimodal\.layers\.1\."):
        start_from_trained(model, tokenizer, (), tmp_path / "deeper")


def test_a_path_means_an_exported_model_a_checkpoint_or_the_newest_of_a_run(pretrained, exported, tmp_path):
    newest = latest_checkpoint(pretrained)
    assert newest.name == "step-000002"
    older = newest.with_name("step-000001")
    assert [model_folder(path) for path in (exported, newest, older, pretrained)] == [exported, newest, older, newest]
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        model_folder(tmp_path)
    shutil.copytree(newest, tmp_path / "cut")
    (tmp_path / "cut" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="a checkpoint that was not finished"):
        model_folder(tmp_path / "cut")


def test_what_is_told_of_a_trained_model(pretrained, prompter, exported):
    trained = load_trained(exported, CPU)
    assert trained.path == exported
    assert trained.weights_sha256 == file_digest(exported / "model.safetensors")
    assert not trained.model.training
    assert trained.dual is trained.model.dual
    folder, description, digest = describe_prompter(prompter)
    assert folder == latest_checkpoint(prompter)
    assert (description.task, description.entities) == ("prompter", ())
    assert digest == load_trained(prompter, CPU).weights_sha256


def test_a_run_begins_with_the_weights_of_its_source(corpus, prompter, pretrained, tmp_path):
    changes = {"start_from": str(pretrained), "train.optimizer.learning_rate": 1e-12}
    train(pretrain_of(corpus, tmp_path / "run", prompter, **changes))
    found, expected = (load_trained(path, CPU).model.state_dict() for path in (tmp_path / "run", pretrained))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The schedule never goes below 1e-8.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7, msg=name)


def test_an_exported_prompter_serves_as_a_run_does(corpus, prompter, tmp_path):
    trained = load_trained(prompter, CPU)
    write_model(tmp_path / "model", trained.description, trained.model.state_dict(), trained.tokenizer)
    for name, source in (("run", prompter), ("exported", tmp_path / "model")):
        train(pretrain_of(corpus, tmp_path / name, source))
    lines = [{k: v for k, v in read_metrics(tmp_path / name)[0].items() if "loss" in k} for name in ("run", "exported")]
    assert lines[0] == lines[1]
    assert lines[0]["loss/pem"] > 0
