"""Names and sizes: the reference's weights come in whole, and go out again as they were."""

import pytest
import torch
from parity import recipe
from parity_files import cases
from reference_models import CONFIG, SIZES, TASKS, model_from, reference_file, reference_model, reference_tensors

from alpro_stream.errors import CheckpointError
from alpro_stream.model.loading import load_by_name
from alpro_stream.model.reference_names import from_reference, prompter_part, reference_task, to_reference

NUM_TEXT_LAYERS = SIZES["fusion_layer"]
UNUSED_CLASSES = {"visual_encoder.model.head.weight", "visual_encoder.model.head.bias"}
UPPER_LAYERS = tuple(f"text_encoder.bert.encoder.layer.{i}." for i in range(NUM_TEXT_LAYERS, SIZES["bert_layers"]))
LEFT_OUT = {
    "pretrain": ("prompter.",),
    "prompter": (*UPPER_LAYERS, "text_encoder.cls.", "itm_head.", "video_prompt_feat", "image_prompt_feat"),
    "retrieval": ("text_encoder.cls.",),
    "qa": ("itm_head.",),
}
"""Besides the classes of the visual encoder; how the names begin that their code registers and does not use."""

each_kind = pytest.mark.parametrize("kind", TASKS)


def left_out(kind):
    names = cases()["state_dict_shapes"][kind]
    return {name for name in names if name in UNUSED_CLASSES or name.startswith(LEFT_OUT[kind])}


@pytest.mark.parametrize("name", cases()["weight_checksums"])
def test_the_recipe_makes_the_weights_it_made(name):
    value = recipe.named_array(name, cases()["state_dict_shapes"]["pretrain"][name])
    assert recipe.checksum(value) == cases()["weight_checksums"][name]


@each_kind
def test_what_a_file_is_for_and_its_sizes_are_read_off_its_weights(kind):
    file = reference_file(kind)
    assert reference_task(file.tensors) == TASKS[kind]
    assert file.vocab_size == SIZES["vocab"]
    # The heads are not 64 long as in published models; nothing tells it.
    heads = [f"video.num_heads={SIZES['vit_heads']}", f"text.num_heads={SIZES['bert_heads']}"]
    assert file.config(heads) == CONFIG


@each_kind
def test_every_weight_is_loaded_or_named_as_left_out(kind):
    file, model = reference_file(kind), reference_model(kind, torch.float32)
    parameters, skipped = file.parameters(TASKS[kind], CONFIG)
    report = load_by_name(model, parameters, "reference", skipped=skipped)
    assert set(report.loaded) == model.state_dict().keys()
    assert not report.resized
    assert not report.missing
    second_names = {name for name in file.tensors if name.endswith("position_ids") or ".decoder." in name}
    assert set(skipped) == left_out(kind) | second_names


@each_kind
def test_what_goes_out_is_what_came_in(kind):
    expected = {name: value for name, value in reference_tensors(kind).items() if name not in left_out(kind)}
    found = to_reference(reference_model(kind, torch.float32).state_dict(), TASKS[kind], NUM_TEXT_LAYERS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_prompter_in_a_pretraining_file_is_another_model():
    tensors = reference_tensors("pretrain")
    part = prompter_part(tensors, "file")
    assert part.keys() == reference_tensors("prompter").keys()
    ours, _ = from_reference(part, "prompter", NUM_TEXT_LAYERS, "prompter")
    assert ours["raw_temperature"].item() == float(recipe.TEACHER_TEMP)
    student, _ = from_reference(tensors, "prompter", NUM_TEXT_LAYERS, "student")
    assert ours.keys() == student.keys()
    assert student["raw_temperature"].item() == float(recipe.TEMP)
    assert not torch.equal(ours["text_projection.weight"], student["text_projection.weight"])


@pytest.mark.parametrize("kind", ["retrieval", "qa", "prompter"])
def test_a_pretraining_file_gives_the_encoders_of_the_other_models(kind):
    found, _ = reference_file("pretrain").parameters(TASKS[kind], CONFIG)
    own = reference_model(kind, torch.float32).state_dict()
    assert {name for name in own if name not in found} == {name for name in own if name.startswith("answer_head.")}
    assert found.keys() <= own.keys()


def test_word_embeddings_that_differ_from_their_second_name_are_refused():
    file = reference_file("pretrain")
    file.tensors["text_encoder.cls.predictions.decoder.weight"][3, 4] += 1
    with pytest.raises(CheckpointError, match=r"decoder.weight and .*word_embeddings.weight are one parameter"):
        model_from(file, torch.float32)
