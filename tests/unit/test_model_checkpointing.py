"""Activation checkpointing: the same losses and gradients, dropout included, from fewer kept tensors."""

import pytest
import torch
from model_files import make_model, model_config
from torch import nn

from alpro_stream.model.checkpointing import run_block, set_checkpointing

VOCAB = 30
CONFIG = model_config(video={"drop_path": 0.4, "depth": 3}, text={"dropout": 0.3, "num_layers": 2})


@pytest.fixture
def model():
    return make_model("pretrain", VOCAB, CONFIG).train()


def make_inputs():
    generator = torch.Generator().manual_seed(4)
    video_BTCHW = torch.randn(4, 2, 3, 32, 32, generator=generator)
    ids_BL = torch.randint(0, VOCAB, (4, 6), generator=generator)
    return video_BTCHW, ids_BL, torch.ones_like(ids_BL)


def all_logits(model, video_BTCHW, ids_BL, mask_BL):
    """Everything that a step computes: all blocks of the encoders, all tokens and the first ones."""
    tokens_BND, video_BE = model.dual.encode_video(video_BTCHW)
    text_BLD, text_BE = model.dual.encode_text(ids_BL, mask_BL)
    fusing = model.multimodal.begin(text_BLD, mask_BL, tokens_BND)
    fused_BSD, words_BLD = model.multimodal.finish(fusing), model.multimodal.finish(fusing, 6)
    feature_BE = model.dual.video_feature(video_BTCHW)
    outputs = [model.match_logits(fused_BSD[:, 0]), model.word_logits(words_BLD), model.entity_logits(fused_BSD[:, 8])]
    return [video_BE, text_BE, feature_BE, *outputs]


def train_once(model, checkpointing, seed=1):
    """(outputs, gradients, bytes kept for the backward pass)."""
    set_checkpointing(model, checkpointing)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = all_logits(model, *make_inputs())
    generator = torch.Generator().manual_seed(5)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    return outputs, gradients, sum(size for place, size in kept.items() if place not in parameters)


def test_outputs_and_gradients_are_the_same_and_less_is_kept(model):
    outputs, gradients, kept = train_once(model, False)
    again, same, less = train_once(model, True)
    for found, expected in zip(again, outputs, strict=True):
        assert torch.equal(found, expected)
    assert same.keys() == gradients.keys() == dict(model.named_parameters()).keys() - {"dual.raw_temperature"}
    for name, gradient in gradients.items():
        assert torch.equal(same[name], gradient), name
        assert gradient.abs().max() > 0, name
    assert less < kept / 2


def test_the_comparison_would_see_another_dropout(model):
    _, gradients, _ = train_once(model, True, seed=1)
    _, others, _ = train_once(model, True, seed=2)
    for name, gradient in gradients.items():
        if name.startswith(("dual.video_encoder", "dual.text_encoder", "multimodal")):
            assert not torch.equal(others[name], gradient), name


def test_it_is_switched_for_every_encoder_and_back(model):
    encoders = (model.dual.video_encoder, model.dual.text_encoder, model.multimodal)
    assert not any(encoder.checkpointing for encoder in encoders)
    set_checkpointing(model, True)
    assert all(encoder.checkpointing for encoder in encoders)
    set_checkpointing(model, False)
    assert not any(encoder.checkpointing for encoder in encoders)


class Counting(nn.Module):
    """Counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, tokens, scale):
        self.calls += 1
        return self.linear(tokens) * scale


@pytest.mark.parametrize(("checkpointing", "calls"), [(False, 1), (True, 2)])
def test_a_block_is_computed_again_only_in_the_backward_pass(checkpointing, calls):
    block = Counting()
    output = run_block(block, checkpointing, torch.ones(2, 3, requires_grad=True), 2)
    assert block.calls == 1
    output.sum().backward()
    assert block.calls == calls
    assert torch.equal(block.linear.bias.grad, torch.full((3,), 4.0))


def test_without_gradients_nothing_is_computed_twice():
    block = Counting()
    with torch.no_grad():
        output = run_block(block, True, torch.ones(2, 3), 2)
    assert not output.requires_grad
    assert block.calls == 1
