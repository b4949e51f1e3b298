"""Names of the authors' code and ours, in both directions."""

import pytest
import torch
from model_files import TASKS, assert_equal_parameters, make_model, parameters_of, their_tensors

from alpro_stream.errors import CheckpointError
from alpro_stream.model.foreign import open_foreign
from alpro_stream.model.reference_names import (
    from_reference,
    num_reference_text_layers,
    prompter_part,
    reference_task,
    to_reference,
)

VOCAB = 40
LOWER_LAYERS = 1
BERT = "text_encoder.bert."
PREDICTIONS = "text_encoder.cls.predictions."

# By hand, for a BERT that is cut after 6 layers.
PAIRS = {
    "visual_encoder.model.cls_token": "dual.video_encoder.cls_token",
    "visual_encoder.model.blocks.11.temporal_attn.qkv.weight": "dual.video_encoder.blocks.11.temporal_attn.qkv.weight",
    "text_encoder.bert.embeddings.word_embeddings.weight": "dual.text_encoder.embeddings.word_embeddings.weight",
    "text_encoder.bert.embeddings.LayerNorm.bias": "dual.text_encoder.embeddings.LayerNorm.bias",
    "text_encoder.bert.encoder.layer.0.attention.self.query.weight": (
        "dual.text_encoder.layers.0.attention.self.query.weight"
    ),
    "text_encoder.bert.encoder.layer.5.output.dense.bias": "dual.text_encoder.layers.5.output.dense.bias",
    "text_encoder.bert.encoder.layer.6.output.dense.bias": "multimodal.layers.0.output.dense.bias",
    "text_encoder.bert.encoder.layer.11.intermediate.dense.weight": "multimodal.layers.5.intermediate.dense.weight",
    "vision_proj.weight": "dual.video_projection.weight",
    "text_proj.bias": "dual.text_projection.bias",
    "text_encoder.cls.predictions.transform.dense.weight": "mlm_head.dense.weight",
    "text_encoder.cls.predictions.transform.LayerNorm.bias": "mlm_head.norm.bias",
    "text_encoder.cls.predictions.bias": "mlm_head.bias",
    "itm_head.weight": "vtm_head.weight",
    "mpm_head.2.bias": "pem_head.2.bias",
}


def without_bert(tensors):
    """As LAVIS names them."""
    return {name.replace(BERT, "text_encoder."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("rename", [lambda tensors: tensors, without_bert], ids=["authors", "LAVIS"])
def test_names_one_by_one(rename):
    theirs = rename({name: torch.full((2,), float(number)) for number, name in enumerate(PAIRS)})
    ours, skipped = from_reference(theirs, "pretrain", 6, "file")
    assert skipped == []
    assert {name: int(tensor[0]) for name, tensor in ours.items()} == {n: i for i, n in enumerate(PAIRS.values())}


def test_answer_head_and_temperature():
    theirs = {"classifier.0.weight": torch.ones(4, 2), "temp": torch.tensor(0.3)}
    ours, _ = from_reference(theirs, "question_answering", 6, "file")
    assert_equal_parameters(
        ours, {"answer_head.0.weight": torch.ones(4, 2), "dual.raw_temperature": torch.tensor([0.3])}
    )


ENCODERS = ("visual_encoder.model.cls_token", f"{BERT}embeddings.word_embeddings.weight", "vision_proj.weight", "temp")


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (
            (*ENCODERS, "itm_head.weight", "mpm_head.0.weight", "prompter.temp", "prompter.video_prompt_feat"),
            "pretrain",
        ),
        ((*ENCODERS, "itm_head.weight", "video_prompt_feat", "image_prompt_feat"), "prompter"),
        ((*ENCODERS, "itm_head.weight"), "retrieval"),
        ((*ENCODERS, "itm_head.weight", "classifier.2.bias"), "question_answering"),
        (("visual_encoder.model.cls_token", "temp"), None),
        (("dual.video_encoder.cls_token", "dual.raw_temperature", "vtm_head.weight"), None),
        (("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "head.weight"), None),
        (("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"), None),
        ((), None),
    ],
)
def test_what_a_file_was_trained_for_is_seen_from_its_heads(names, task):
    assert reference_task(names) == task
    assert reference_task(without_bert(dict.fromkeys(names))) == task


@pytest.mark.parametrize("task", TASKS)
def test_the_task_of_a_file_of_ours_under_their_names(task):
    model = make_model(task, VOCAB)
    assert reference_task(to_reference(model.state_dict(), task, LOWER_LAYERS)) == task


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rename", [lambda tensors: tensors, without_bert], ids=["authors", "LAVIS"])
def test_ours_to_theirs_and_back(task, rename):
    model = make_model(task, VOCAB)
    theirs = rename(to_reference(model.state_dict(), task, LOWER_LAYERS))
    ours, skipped = from_reference(theirs, task, LOWER_LAYERS, "file")
    assert_equal_parameters(ours, model.state_dict())
    second_names = [name for name in theirs if ".decoder." in name or name.endswith("position_ids")]
    assert sorted(skipped) == sorted(second_names)
    assert len(second_names) == (3 if task == "pretrain" else 1)
    assert theirs["temp"].shape == ()


def test_what_the_authors_code_reads_beside_our_parameters():
    model = make_model("pretrain", VOCAB)
    theirs = their_tensors(model, "pretrain")
    words = theirs[f"{BERT}embeddings.word_embeddings.weight"]
    assert torch.equal(theirs[f"{PREDICTIONS}decoder.weight"], words)
    assert theirs[f"{PREDICTIONS}decoder.weight"].data_ptr() != words.data_ptr()
    assert torch.equal(theirs[f"{PREDICTIONS}decoder.bias"], model.mlm_head.bias)
    assert theirs[f"{BERT}embeddings.position_ids"].tolist() == [list(range(16))]
    answering = their_tensors(make_model("question_answering", VOCAB), "question_answering")
    assert "text_encoder.embeddings.word_embeddings.weight" in answering
    assert not any(name.startswith(BERT) for name in answering)


@pytest.mark.parametrize("name", ["decoder.weight", "decoder.bias"])
def test_two_names_of_one_parameter_that_differ_are_refused(name):
    theirs = their_tensors(make_model("pretrain", VOCAB), "pretrain")
    from_reference(theirs, "pretrain", LOWER_LAYERS, "file.pt")
    theirs[PREDICTIONS + name][-1] += 1e-3
    with pytest.raises(CheckpointError, match=rf"file\.pt: .*{name} and text_encoder.* are one parameter.*differ"):
        from_reference(theirs, "pretrain", LOWER_LAYERS, "file.pt")


def test_an_unknown_name_is_refused():
    theirs = their_tensors(make_model("retrieval", VOCAB), "retrieval")
    theirs["itm_heat.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"file\.pt: itm_heat\.weight is no parameter of the authors' models"):
        from_reference(theirs, "retrieval", LOWER_LAYERS, "file.pt")
    with pytest.raises(CheckpointError, match=r"fusion\.weight has no name in the authors' models"):
        to_reference({"fusion.weight": torch.ones(1)}, "retrieval", LOWER_LAYERS)


@pytest.mark.parametrize(
    ("task", "heads"),
    [
        ("prompter", set()),
        ("retrieval", {"multimodal", "vtm_head"}),
        ("question_answering", {"multimodal"}),
    ],
)
def test_a_pretraining_file_gives_the_other_models_what_it_has_for_them(task, heads):
    theirs = their_tensors(make_model("pretrain", VOCAB), "pretrain")
    ours, skipped = from_reference(theirs, task, LOWER_LAYERS, "file")
    own = parameters_of(make_model(task, VOCAB))
    assert {name for name in own if name not in ours} == {name for name in own if name.startswith("answer_head.")}
    assert ours.keys() <= own.keys()
    if task != "prompter":
        assert {name.partition(".")[0] for name in ours} == {"dual", *heads}
    assert len(ours) + len(skipped) == len(theirs)
    assert {"mpm_head.0.weight", f"{PREDICTIONS}bias"} <= set(skipped)


def test_what_their_code_registers_and_never_uses_is_skipped():
    unused = {
        "visual_encoder.model.head.weight": torch.ones(4, 64),
        "text_encoder.bert.pooler.dense.bias": torch.ones(64),
        "video_prompt_feat": torch.ones(5, 8),
        "image_prompt_feat": torch.ones(5, 8),
        "prompter.temp": torch.tensor(0.1),
    }
    _, skipped = from_reference(unused, "pretrain", LOWER_LAYERS, "file")
    assert skipped == list(unused)


def test_the_prompter_in_a_pretraining_file_is_a_model_of_its_own():
    prompter = make_model("prompter", VOCAB, seed=1)
    inside = {f"prompter.{name}": tensor for name, tensor in their_tensors(prompter, "prompter").items()}
    theirs = {**their_tensors(make_model("pretrain", VOCAB), "pretrain"), **inside}
    assert reference_task(theirs) == "pretrain"
    part = prompter_part(theirs, "file")
    assert reference_task(part) == "prompter"
    ours, skipped = from_reference(part, "prompter", LOWER_LAYERS, "file")
    assert_equal_parameters(ours, prompter.state_dict())
    assert {"video_prompt_feat", "itm_head.weight", f"{BERT}encoder.layer.1.output.dense.bias"} <= set(skipped)
    assert len(ours) + len(skipped) == len(part)
    with pytest.raises(CheckpointError, match="carries no prompter"):
        prompter_part(part, "file")


def test_layers_of_a_bert_are_counted_with_and_without_its_name():
    names = [f"{BERT}encoder.layer.{number}.output.dense.bias" for number in (10, *range(10))]
    assert num_reference_text_layers(names) == 11
    assert num_reference_text_layers(without_bert(dict.fromkeys(names))) == 11
    assert num_reference_text_layers(["visual_encoder.model.blocks.3.norm1.bias"]) == 0
    with pytest.raises(CheckpointError, match="numbered 0, 99999999"):
        num_reference_text_layers([names[1], f"{BERT}encoder.layer.99999999.output.dense.bias"])


def test_a_parameter_under_both_names_is_refused():
    theirs = {"text_encoder.bert.embeddings.LayerNorm.bias": torch.zeros(4)}
    twice = theirs | {"text_encoder.embeddings.LayerNorm.bias": torch.ones(4)}
    assert len(from_reference(theirs, "retrieval", 1, "file")[0]) == 1
    with pytest.raises(CheckpointError, match="twice, with and without"):
        from_reference(twice, "retrieval", 1, "file")


@pytest.mark.parametrize("task", ["retrieval", "question_answering"])
def test_a_file_of_lavis_in_its_wrapper(tmp_path, task):
    model = make_model(task, VOCAB)
    tensors = without_bert(their_tensors(model, task))
    torch.save({"model": tensors, "epoch": 4}, tmp_path / "lavis.pth")
    file = open_foreign(tmp_path / "lavis.pth")
    assert file.task == task
    ours, _ = file.parameters(task, model.config)
    assert_equal_parameters(ours, model.state_dict())
