"""Text encoder and multimodal encoder: the lower and the upper half of one BERT (paper, section 3.1).

Legend: B texts, L tokens, D width, N video tokens, S = L + N, V vocabulary, Q tokens that are asked for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.model.checkpointing import run_block
from alpro_stream.model.precision import initialise_weights

LAYER_NORM_EPS = 1e-12
MASKED_SCORE = -1e4
"""Added to the attention score of padding: its weight underflows to 0 in every number format."""


class TextEncoderConfig(Config):
    """Sizes of both halves of the BERT; the defaults are BERT-base, cut in the middle."""

    width: int = Field(default=768, gt=0)
    """Length of a token; a multiple of `num_heads`, and equal to the video encoder's width."""
    num_layers: int = Field(default=6, gt=0)
    """Layers of the text encoder, the lower part of the BERT."""
    num_multimodal_layers: int = Field(default=6, gt=0)
    """Layers of the multimodal encoder, the part above."""
    num_heads: int = Field(default=12, gt=0)
    """Attention heads of every layer."""
    intermediate_size: int = Field(default=3072, gt=0)
    """Hidden width of a layer's MLP."""
    max_positions: int = Field(default=512, gt=0)
    """Longest text in tokens."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of embeddings, attention weights and layer outputs."""
    pretrained: str | None = None
    """BERT to start from: a hub name such as bert-base-uncased, or a local folder; null starts at random."""

    @model_validator(mode="after")
    def _check_sizes(self) -> "TextEncoderConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one")
        return self

    def bert_config(self, vocab_size: int) -> BertConfig:
        """The same sizes in the form that the BERT layers of `transformers` read."""
        return BertConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.num_layers + self.num_multimodal_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_positions,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            layer_norm_eps=LAYER_NORM_EPS,
            # Padding is masked, so its embedding needs no special row, whatever id the tokenizer gives it.
            pad_token_id=None,
            attn_implementation="sdpa",
        )


class TextEncoder(nn.Module):
    """Embeddings and lower layers."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        bert = config.bert_config(vocab_size)
        self.embeddings = BertEmbeddings(bert)
        self.layers = nn.ModuleList(BertLayer(bert) for _ in range(config.num_layers))
        self.checkpointing = False
        """Whether layers are computed again in the backward pass; see `alpro_stream.model.checkpointing`."""
        self.apply(initialise_weights)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Encodes token ids; `mask_BL` is 1 (or True) on tokens and 0 on padding.

        Returns:
            text_BLD; rows of padding are computed too and mean nothing.

        Raises:
            ConfigError: the text has more tokens than there are positions.
        """
        if ids_BL.shape[1] > self.config.max_positions:
            raise ConfigError(
                f"texts of {ids_BL.shape[1]} tokens do not fit the {self.config.max_positions} positions of the "
                "text encoder; shorten the texts or raise text.max_positions"
            )
        text_BLD: Tensor = self.embeddings(ids_BL)
        scores_B11L = attention_scores(mask_BL, text_BLD.dtype)
        for layer in self.layers:
            text_BLD = run_block(layer, self.checkpointing, text_BLD, scores_B11L)
        return text_BLD


@dataclass(frozen=True)
class Fusing:
    """Pairs of text and video before the last multimodal layer, which computes only what is asked for."""

    tokens_BSD: Tensor
    scores_B11S: Tensor

    def __getitem__(self, rows: slice) -> "Fusing":
        return Fusing(self.tokens_BSD[rows], self.scores_B11S[rows])


class MultimodalEncoder(nn.Module):
    """Upper layers, over text and video tokens side by side (no cross-attention)."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int) -> None:
        super().__init__()
        bert = config.bert_config(vocab_size)
        self.layers = nn.ModuleList(BertLayer(bert) for _ in range(config.num_multimodal_layers))
        self.checkpointing = False
        """Whether layers are computed again in the backward pass; see `alpro_stream.model.checkpointing`."""
        self.apply(initialise_weights)

    def forward(self, text_BLD: Tensor, mask_BL: Tensor, video_BND: Tensor, num_tokens: int | None = None) -> Tensor:
        """Fuses the output of the text encoder with that of the video encoder.

        Args:
            text_BLD: from the text encoder.
            mask_BL: 1 (or True) on tokens and 0 on padding; video is never masked.
            video_BND: from the video encoder.
            num_tokens: Q, how many tokens at the front are wanted: 1 for CLS alone. None for all.

        Returns:
            fused_BQD: the text tokens, then the video tokens.
        """
        return self.finish(self.begin(text_BLD, mask_BL, video_BND), num_tokens)

    def begin(self, text_BLD: Tensor, mask_BL: Tensor, video_BND: Tensor) -> Fusing:
        """All layers but the last; its rows may then be finished each in its own way."""
        tokens_BSD = torch.cat([text_BLD, video_BND], dim=1)
        mask_BS = torch.cat([mask_BL, mask_BL.new_ones(video_BND.shape[:2])], dim=1)
        scores_B11S = attention_scores(mask_BS, tokens_BSD.dtype)
        for layer in self.layers[:-1]:
            tokens_BSD = run_block(layer, self.checkpointing, tokens_BSD, scores_B11S)
        return Fusing(tokens_BSD, scores_B11S)

    def finish(self, fusing: Fusing, num_tokens: int | None = None) -> Tensor:
        """The last layer, for the first `num_tokens` tokens (all if None); fused_BQD.

        The other tokens are still read, but nothing else is computed for them: about five sixths of a layer.
        """
        layer = self.layers[-1]
        fused_BQD: Tensor
        if num_tokens is None:
            fused_BQD = run_block(layer, self.checkpointing, fusing.tokens_BSD, fusing.scores_B11S)
            return fused_BQD
        fused_BQD = run_block(
            _first_tokens, self.checkpointing, layer, fusing.tokens_BSD, fusing.scores_B11S, num_tokens
        )
        return fused_BQD


def _first_tokens(layer: Any, tokens_BSD: Tensor, scores_B11S: Tensor, num_tokens: int) -> Tensor:
    """Output of a `BertLayer` for the tokens at the front, from the layer's own parts."""
    attention, asking_BQD = layer.attention, tokens_BSD[:, :num_tokens]
    heads = attention.self.num_attention_heads
    query = _split_heads(attention.self.query(asking_BQD), heads)
    key = _split_heads(attention.self.key(tokens_BSD), heads)
    value = _split_heads(attention.self.value(tokens_BSD), heads)
    dropout = attention.self.dropout.p if layer.training else 0.0
    mixed = scaled_dot_product_attention(query, key, value, scores_B11S.to(query.dtype), dropout)
    attended_BQD = attention.output(mixed.transpose(1, 2).flatten(2), asking_BQD)
    fused_BQD: Tensor = layer.output(layer.intermediate(attended_BQD), attended_BQD)
    return fused_BQD


def _split_heads(tokens_BSD: Tensor, num_heads: int) -> Tensor:
    """(B, heads, S, D / heads)."""
    batch, length, _ = tokens_BSD.shape
    return tokens_BSD.view(batch, length, num_heads, -1).transpose(1, 2)


class MlmHead(nn.Module):
    """BERT's head for masked tokens: a transform, then the word embeddings as the output matrix.

    The embeddings are borrowed, not owned: the head registers no second name for that parameter, so it is
    stored once and an optimiser sees it once.
    """

    def __init__(self, width: int, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(word_embeddings.num_embeddings))
        self.apply(initialise_weights)
        # A tuple hides the module from registration; copies of the whole model keep the tie.
        self._borrowed = (word_embeddings,)

    def forward(self, text_BLD: Tensor) -> Tensor:
        """Scores of every word of the vocabulary at every position, logits_BLV."""
        hidden_BLD = self.norm(gelu(self.dense(text_BLD)))
        return linear(hidden_BLD, self._borrowed[0].weight, self.bias)


def attention_scores(mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask, (B, 1, 1, S): 0 where attended, a large negative score where not."""
    return (mask_BS == 0).to(dtype)[:, None, None, :] * MASKED_SCORE
