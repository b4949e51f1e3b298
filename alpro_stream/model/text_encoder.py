"""Text encoder and multimodal encoder: the lower and the upper half of one BERT (paper, section 3.1).

Legend: B texts, L tokens, D width, N video tokens, S = L + N, V vocabulary.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
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
            text_BLD = layer(text_BLD, scores_B11L)
        return text_BLD


class MultimodalEncoder(nn.Module):
    """Upper layers, over text and video tokens side by side (no cross-attention)."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int) -> None:
        super().__init__()
        bert = config.bert_config(vocab_size)
        self.layers = nn.ModuleList(BertLayer(bert) for _ in range(config.num_multimodal_layers))
        self.apply(initialise_weights)

    def forward(self, text_BLD: Tensor, mask_BL: Tensor, video_BND: Tensor) -> Tensor:
        """Fuses the output of the text encoder with that of the video encoder.

        Returns:
            fused_BSD: the text tokens, then the video tokens; video is never masked.
        """
        fused_BSD = torch.cat([text_BLD, video_BND], dim=1)
        mask_BS = torch.cat([mask_BL, mask_BL.new_ones(video_BND.shape[:2])], dim=1)
        scores_B11S = attention_scores(mask_BS, fused_BSD.dtype)
        for layer in self.layers:
            fused_BSD = layer(fused_BSD, scores_B11S)
        return fused_BSD


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
