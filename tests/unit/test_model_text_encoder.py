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
