import copy

import pytest
import torch
from pydantic import ValidationError
from transformers import BertForMaskedLM, BertModel

from alpro_stream.errors import ConfigError
from alpro_stream.model.text_encoder import MlmHead, MultimodalEncoder, TextEncoder, TextEncoderConfig

VOCAB = 50
SMALL = TextEncoderConfig(
    width=16, num_layers=2, num_multimodal_layers=3, num_heads=4, intermediate_size=24, max_positions=12
)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids_BL = torch.randint(5, VOCAB, (3, 7))
    mask_BL = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    return ids_BL * mask_BL, mask_BL


@pytest.fixture
def halves():
    torch.manual_seed(1)
    return TextEncoder(SMALL, VOCAB).eval(), MultimodalEncoder(SMALL, VOCAB).eval()


@torch.no_grad()
def test_both_halves_over_text_alone_equal_bert(batch, halves):
    ids_BL, mask_BL = batch
    lower, upper = halves
    bert = BertModel(SMALL.bert_config(VOCAB), add_pooling_layer=False).eval()
    bert.embeddings.load_state_dict(lower.embeddings.state_dict())
    for ours, theirs in zip([*lower.layers, *upper.layers], bert.encoder.layer, strict=True):
        theirs.load_state_dict(ours.state_dict())
    no_video_BND = torch.zeros(3, 0, 16)
    fused_BSD = upper(lower(ids_BL, mask_BL), mask_BL, no_video_BND)
    expected = bert(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    torch.testing.assert_close(fused_BSD[mask_BL.bool()], expected[mask_BL.bool()])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_changes_nothing(batch, halves, dtype):
    ids_BL, mask_BL = batch
    lower, upper = halves
    other_BL = ids_BL + 3 * (1 - mask_BL)
    video_BND = torch.randn(3, 5, 16)
    first = upper(lower(ids_BL, mask_BL), mask_BL, video_BND)
    second = upper(lower(other_BL, mask_BL.to(dtype)), mask_BL.to(dtype), video_BND)
    seen_BS = torch.cat([mask_BL, torch.ones(3, 5, dtype=torch.int64)], dim=1).bool()
    assert torch.equal(first[seen_BS], second[seen_BS])
    assert not torch.equal(first[~seen_BS], second[~seen_BS])


@torch.no_grad()
def test_text_and_video_see_each_other(batch, halves):
    ids_BL, mask_BL = batch
    lower, upper = halves
    text_BLD = lower(ids_BL, mask_BL)
    video_BND = torch.randn(3, 5, 16)
    changed_BND = video_BND.clone()
    changed_BND[:, 4] += 1  # the last video token
    difference_BS = (upper(text_BLD, mask_BL, video_BND) - upper(text_BLD, mask_BL, changed_BND)).abs().amax(-1)
    assert difference_BS.shape == (3, 12)
    assert (difference_BS > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 12])
def test_the_first_tokens_alone_equal_those_of_the_whole(batch, halves, num_tokens):
    ids_BL, mask_BL = batch
    lower, upper = halves
    text_BLD, video_BND = lower(ids_BL, mask_BL), torch.randn(3, 5, 16)
    expected_BSD = upper(text_BLD, mask_BL, video_BND)
    found_BQD = upper(text_BLD, mask_BL, video_BND, num_tokens)
    assert found_BQD.shape == (3, num_tokens, 16)
    # Rows of padding are computed too, so they are compared as well.
    torch.testing.assert_close(found_BQD, expected_BSD[:, :num_tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_gradients_through_the_first_tokens_alone_in_training(batch, num_tokens):
    _, mask_BL = batch
    encoder = MultimodalEncoder(SMALL.model_copy(update={"dropout": 0.0}), VOCAB).double().train()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    text_BLD = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    video_BND = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    inputs = [text_BLD, video_BND, *encoder.parameters()]
    weights_BQD = torch.randn(3, num_tokens, 16).double()
    whole_BQD = encoder(text_BLD, mask_BL, video_BND)[:, :num_tokens]
    alone_BQD = encoder(text_BLD, mask_BL, video_BND, num_tokens)
    torch.testing.assert_close(alone_BQD, whole_BQD, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad((out * weights_BQD).sum(), inputs) for out in (whole_BQD, alone_BQD))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_dropout_reaches_the_first_tokens_alone(batch):
    _, mask_BL = batch
    encoder = MultimodalEncoder(SMALL.model_copy(update={"dropout": 0.5}), VOCAB).train()
    text_BLD, video_BND = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    fusing = encoder.begin(text_BLD, mask_BL, video_BND)
    torch.manual_seed(1)
    first = encoder.finish(fusing, 1)
    torch.manual_seed(1)
    assert torch.equal(encoder.finish(fusing, 1), first)
    assert not torch.equal(encoder.finish(fusing, 1), first)
    assert torch.equal(encoder.eval().finish(fusing, 1), encoder.finish(fusing, 1))


@torch.no_grad()
def test_rows_may_be_finished_each_in_its_own_way(batch, halves):
    ids_BL, mask_BL = batch
    lower, upper = halves
    text_BLD, video_BND = lower(ids_BL, mask_BL), torch.randn(3, 5, 16)
    expected_BSD = upper(text_BLD, mask_BL, video_BND)
    fusing = upper.begin(text_BLD, mask_BL, video_BND)
    torch.testing.assert_close(upper.finish(fusing[:1]), expected_BSD[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(upper.finish(fusing[1:3], 4), expected_BSD[1:3, :4], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_single_layer_is_the_last_one(batch):
    _, mask_BL = batch
    config = SMALL.model_copy(update={"num_multimodal_layers": 1})
    encoder = MultimodalEncoder(config, VOCAB).eval()
    text_BLD, video_BND = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    whole_BSD = encoder(text_BLD, mask_BL, video_BND)
    torch.testing.assert_close(encoder(text_BLD, mask_BL, video_BND, 1), whole_BSD[:, :1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole_BSD[:, :7], text_BLD)


@torch.no_grad()
def test_mlm_head_equals_that_of_bert(halves):
    lower, _ = halves
    bert = BertForMaskedLM(SMALL.bert_config(VOCAB)).eval()
    head = MlmHead(16, lower.embeddings.word_embeddings).eval()
    torch.nn.init.normal_(head.bias)
    theirs = bert.cls.predictions
    theirs.transform.dense.load_state_dict(head.dense.state_dict())
    theirs.transform.LayerNorm.load_state_dict(head.norm.state_dict())
    theirs.decoder.weight.copy_(lower.embeddings.word_embeddings.weight)
    theirs.decoder.bias.copy_(head.bias)
    text_BLD = torch.randn(2, 4, 16)
    torch.testing.assert_close(head(text_BLD), theirs(text_BLD))


def test_mlm_head_borrows_the_word_embeddings(halves):
    lower, _ = halves
    both = torch.nn.ModuleDict({"text": lower, "head": MlmHead(16, lower.embeddings.word_embeddings)})
    assert [name for name, _ in both["head"].named_parameters()] == [
        "bias",
        "dense.weight",
        "dense.bias",
        "norm.weight",
        "norm.bias",
    ]
    both["head"](torch.randn(1, 2, 16)).sum().backward()
    assert lower.embeddings.word_embeddings.weight.grad is not None
    twin = copy.deepcopy(both)
    with torch.no_grad():
        twin["text"].embeddings.word_embeddings.weight.zero_()
    assert twin["head"](torch.randn(1, 2, 16)).abs().max() == 0
    assert both["head"](torch.randn(1, 2, 16)).abs().max() > 0


def test_every_word_id_can_learn(halves):
    lower, _ = halves
    lower(torch.tensor([[0, 1]]), torch.ones(1, 2)).pow(3).sum().backward()
    assert lower.embeddings.word_embeddings.weight.grad[:2].abs().amax(1).gt(0).all()


def test_too_long_text_names_both_lengths(halves):
    with pytest.raises(ConfigError, match=r"13 tokens.*12 positions"):
        halves[0](torch.zeros(1, 13, dtype=torch.int64), torch.ones(1, 13))


def test_heads_must_divide_the_width():
    with pytest.raises(ValidationError, match="num_heads 5"):
        TextEncoderConfig(width=16, num_heads=5)
