"""Prompts, the prompt bank and the soft labels."""

import os
import subprocess

import pytest
import torch
from torch.nn.functional import normalize

from alpro_stream.losses.pem import PemConfig, pem_loss
from alpro_stream.model.alpro import DualEncoder, ModelConfig
from alpro_stream.model.pixels import normalise
from alpro_stream.prompter.bank import bank_path, build_bank, load_bank, write_bank
from alpro_stream.prompter.labels import Labeller
from alpro_stream.prompter.prompts import prompts, templates
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.shards import write_tokenizer

ENTITIES = ("dog", "cat", "boat")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), 12)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig.model_validate(TINY_MODEL), tokenizer.vocab_size)
    for parameter in model.parameters():  # A fresh model has nearly equal features for everything.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_there_are_twelve_published_templates_of_each_kind():
    assert set(templates("video")) == {
        f"A {what} of {article} {{}}."
        for what in ("footage", "video", "portrait", "video footage")
        for article in ("a", "the", "one")
    }
    assert set(templates("image")) == {
        f"A {what} of {article} {{}}."
        for what in ("photo", "picture", "good photo", "good picture")
        for article in ("a", "the", "one")
    }
    assert len(templates("video")) == len(templates("image")) == 12


def test_prompts_go_template_by_template():
    found = prompts(("dog", "cat"), "video")
    assert len(found) == 24
    assert found[:4] == ["A footage of a dog.", "A footage of a cat.", "A footage of the dog.", "A footage of the cat."]


def test_an_entity_is_the_mean_of_its_unit_prompts_and_not_normalised_again(encoder, tokenizer):
    bank = build_bank(encoder, tokenizer, ENTITIES, "video")
    assert bank.shape == (3, 16)
    for row, entity in enumerate(ENTITIES):
        features = []
        for template in templates("video"):
            ids, mask = tokenizer([template.format(entity)], 15)
            text = encoder.text_encoder(ids, mask)[:, 0]
            features.append(normalize(encoder.text_projection(text), dim=1)[0])
        torch.testing.assert_close(bank[row], torch.stack(features).mean(0), rtol=1e-4, atol=1e-6)
    assert (bank.norm(dim=1) < 0.999).all()


def test_a_single_prompt_is_one_sentence_with_a_bank_of_its_own(encoder, tokenizer, tmp_path):
    bank = build_bank(encoder, tokenizer, ENTITIES, "video", "single")
    ids, mask = tokenizer([f"A video of a {entity}." for entity in ENTITIES], 15)
    torch.testing.assert_close(bank, encoder.encode_text(ids, mask)[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(3))
    paths = {bank_path(tmp_path, "digest", tokenizer, ENTITIES, how) for how in ("single", "ensemble")}
    assert len(paths) == 2
    write_bank(encoder, tokenizer, ENTITIES, tmp_path / "single", "single")
    torch.testing.assert_close(load_bank(tmp_path / "single")["video"], bank)


def test_kinds_have_banks_of_their_own(encoder, tokenizer, tmp_path):
    path = bank_path(tmp_path / "banks", "digest", tokenizer, ENTITIES)
    write_bank(encoder, tokenizer, ENTITIES, path)
    banks = load_bank(path)
    assert torch.equal(banks["image"], build_bank(encoder, tokenizer, ENTITIES, "image"))
    assert not torch.equal(banks["image"], banks["video"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_killed_writers_left_goes_when_a_bank_is_made(encoder, tokenizer, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, growing = (tmp_path / f".prompt_bank-a.safetensors.{pid}" for pid in (ended.pid, os.getpid()))
    for file in (left, growing):
        file.touch()
    path = bank_path(tmp_path, "digest", tokenizer, ENTITIES)
    write_bank(encoder, tokenizer, ENTITIES, path)
    assert {*tmp_path.iterdir()} == {path, growing}


def test_another_prompter_vocabulary_or_tokenizer_is_another_file(tokenizer, tmp_path):
    other = write_tokenizer(tmp_path / "other")
    (other / "vocab.txt").write_text((other / "vocab.txt").read_text() + "zebra\n")
    paths = [
        bank_path(tmp_path, "digest", tokenizer, ENTITIES),
        bank_path(tmp_path, "other digest", tokenizer, ENTITIES),
        bank_path(tmp_path, "digest", tokenizer, (*ENTITIES, "cup")),
        bank_path(tmp_path, "digest", tokenizer, ("cat", "dog", "boat")),
        bank_path(tmp_path, "digest", Tokenizer(str(other), 12), ENTITIES),
    ]
    assert len(set(paths)) == 5
    assert bank_path(tmp_path, "digest", tokenizer, list(ENTITIES)) == paths[0]


BOXES = torch.tensor([[0, 0, 2, 2], [1, 1, 2, 1]])


def clips():
    return torch.randint(0, 256, (2, 2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labeller(encoder, tokenizer):
    banks = {kind: build_bank(encoder, tokenizer, ENTITIES, kind) for kind in ("video", "image")}
    encoder.train().requires_grad_(True)
    return Labeller(encoder, banks, PemConfig(threshold=0.0), patch_size=16)


def test_labels_are_the_softmax_over_prompts_of_the_blackened_clip(labeller, encoder, tokenizer):
    frames = clips()
    black = torch.zeros_like(frames)
    black[0, :, 0:32, 0:32] = frames[0, :, 0:32, 0:32]
    black[1, :, 16:48, 16:32] = frames[1, :, 16:48, 16:32]
    _, features = encoder.encode_video(normalise(black))
    for kind in ("video", "image"):
        scores = features @ build_bank(encoder, tokenizer, ENTITIES, kind).T / encoder.raw_temperature
        labels = labeller(frames, BOXES, kind)
        torch.testing.assert_close(labels.labels_BM, scores.softmax(1))
        assert labels.keep_B.tolist() == [True, True]


def test_only_pixels_inside_the_crop_count(labeller):
    frames = clips()
    before = labeller(frames, BOXES, "video").labels_BM
    frames[0, :, 32:, 32:] = 255 - frames[0, :, 32:, 32:]
    assert torch.equal(labeller(frames, BOXES, "video").labels_BM, before)
    frames[0, :, :16, :16] = 255 - frames[0, :, :16, :16]
    assert not torch.equal(labeller(frames, BOXES, "video").labels_BM[0], before[0])


def test_confidence_decides_what_is_kept(encoder, labeller, tokenizer):
    largest = labeller(clips(), BOXES, "video").labels_BM.amax(1)
    banks = {"video": build_bank(encoder, tokenizer, ENTITIES, "video")}
    strict = Labeller(encoder, banks, PemConfig(threshold=largest.mean().item()), patch_size=16)
    keep = strict(clips(), BOXES, "video").keep_B
    assert torch.equal(keep, largest >= largest.mean())
    assert keep.sum() == 1


def test_the_prompter_is_frozen(labeller, encoder):
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    labels = labeller(clips(), BOXES, "video").labels_BM
    assert not labels.requires_grad
    # The labels become part of PEM's graph: inference tensors could not.
    logits = torch.zeros(2, 3, requires_grad=True)
    pem_loss(logits, labels, torch.tensor([True, True])).backward()
    torch.testing.assert_close(logits.grad, (torch.full((2, 3), 1 / 3) - labels) / 2)


def test_bf16_computes_the_encoder_in_it_and_the_labels_in_float32(labeller, encoder, tokenizer):
    banks = {"video": build_bank(encoder, tokenizer, ENTITIES, "video")}
    with_bf16 = Labeller(encoder, banks, PemConfig(threshold=0.0), patch_size=16, precision="bf16")
    exact, rounded = (one(clips(), BOXES, "video").labels_BM for one in (labeller, with_bf16))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(rounded.sum(1), torch.ones(2))
    # Of a caller's autocast the similarities see nothing either: they are the ones that the temperature magnifies.
    with torch.autocast("cpu", torch.bfloat16):
        around = labeller(clips(), BOXES, "video").labels_BM
    assert torch.equal(around, rounded)


@pytest.fixture
def _no_compiled_functions():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_compiled_functions")
def test_compiled_labels_are_those_of_the_same_labeller(labeller, encoder, tokenizer, monkeypatch):
    # Traced as for the GPU; compiling for a CPU would take minutes.
    compile_function, compiled_parts = torch.compile, []

    def trace(function, **options):
        compiled_parts.append(function.__name__)
        return compile_function(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    banks = {kind: build_bank(encoder, tokenizer, ENTITIES, kind) for kind in ("video", "image")}
    compiled = Labeller(encoder, banks, PemConfig(threshold=0.0), patch_size=16, compile=True)
    for frames, kind in ((clips(), "video"), (clips()[:, :1], "image")):
        expected = labeller(frames, BOXES, kind)
        found = compiled(frames, BOXES, kind)
        torch.testing.assert_close(found.labels_BM, expected.labels_BM, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.keep_B, expected.keep_B)
        assert not found.labels_BM.is_inference()
    assert compiled_parts == ["_features"]
