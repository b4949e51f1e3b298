"""Captions to token ids, and MLM's masking of them. Tensors: B batch, L tokens."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import AutoTokenizer

from alpro_stream.config import Config
from alpro_stream.errors import TokenizerError
from alpro_stream.stream.seeds import Draws

IGNORED_LABEL = -100
_MASKED, _REPLACED = 0.8, 0.1


class TextConfig(Config):
    """How captions become tokens."""

    tokenizer: str
    """A directory with a BERT WordPiece tokenizer, or a name on the hub such as bert-base-uncased."""
    num_tokens: int = Field(default=30, ge=3)
    """Length every caption is cut or padded to, CLS and SEP included."""
    mlm_probability: float = Field(default=0.15, ge=0, le=1)
    """Share of the tokens that MLM hides and predicts."""


@dataclass(frozen=True, slots=True)
class MaskedText:
    """MLM's input and targets: `ids_L` with some tokens hidden, `labels_L` -100 where nothing is predicted."""

    ids_L: NDArray[np.int64]
    labels_L: NDArray[np.int64]


class Tokenizer:
    """A BERT WordPiece tokenizer with a fixed length.

    Attributes:
        vocab_size: rows of the embedding it needs.
        digest: of its vocabulary and rules, wherever they are stored; part of a run's fingerprint.

    Args:
        source: a local directory or a hub name.
        num_tokens: length of every row.

    Raises:
        TokenizerError: nothing there, or a tokenizer without BERT's CLS, SEP, PAD and MASK.
    """

    def __init__(self, source: str, num_tokens: int) -> None:
        try:
            # A name on the hub has at most one slash; asking the hub for a path would only take time.
            parent = Path(source).parent
            is_path = (
                source.startswith((".", "/", "~")) or source.count("/") > 1 or (parent != Path() and parent.exists())
            )
            self._tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_path)
        except Exception as error:  # A damaged file gives anything; the Rust part raises bare Exceptions.
            raise TokenizerError(
                f"no tokenizer at {source!r} (neither a directory with tokenizer.json or vocab.txt, nor a name "
                f"that can be loaded from the hub here); `alpro shard` writes one when `wordpiece` is set: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        for name in ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
            if getattr(self._tokenizer, name, None) is None:
                raise TokenizerError(f"the tokenizer at {source!r} has no {name}; a BERT tokenizer is needed")
        if not self._tokenizer.is_fast:
            raise TokenizerError(f"the tokenizer at {source!r} has no tokenizer.json; save it with its fast version")
        self.num_tokens = num_tokens
        self.vocab_size = len(self._tokenizer)
        self.digest = _digest(self._tokenizer.backend_tokenizer.to_str())
        self.mask_id = int(self._tokenizer.mask_token_id)
        self._special_ids = np.asarray(sorted(self._tokenizer.all_special_ids), dtype=np.int64)

    def __call__(self, texts: Sequence[str], num_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask of the texts, both (B, L) int64; longer texts are cut."""
        encoded = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=num_tokens or self.num_tokens,
            return_attention_mask=True,
        )
        return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])

    def mask(self, ids_L: NDArray[np.int64], probability: float, draws: Draws) -> MaskedText:
        """Hides tokens of one caption for MLM; the draws belong to the caption and its token positions."""
        # Three draws a position, laid out position by position: padding cannot shift them.
        uniform_L3 = draws.uniform(len(ids_L), 3)
        special_L = np.isin(ids_L, self._special_ids)
        return mask_tokens(ids_L, special_L, uniform_L3, probability, self.mask_id, self.vocab_size)

    def save(self, directory: Path) -> None:
        """Writes the tokenizer so that its directory can be given as the source."""
        self._tokenizer.save_pretrained(str(directory))


def mask_tokens(
    ids_L: NDArray[np.int64],
    special_L: NDArray[np.bool_],
    uniform_L3: NDArray[np.float64],
    probability: float,
    mask_id: int,
    vocab_size: int,
) -> MaskedText:
    """BERT's masking: of the chosen tokens 80 % become MASK, 10 % any token, 10 % stay (Devlin et al. 2019).

    Args:
        ids_L: token ids.
        special_L: positions that are never chosen (CLS, SEP, padding, ...).
        uniform_L3: draws in [0, 1): chosen at all, what happens to it, which token instead.
        probability: share of the tokens that is chosen.
        mask_id: id of MASK.
        vocab_size: the random token is uniform over all ids.
    """
    chosen_L = (uniform_L3[:, 0] < probability) & ~special_L
    fate_L = uniform_L3[:, 1]
    masked_L = np.where(chosen_L & (fate_L < _MASKED), mask_id, ids_L)
    replaced_L = chosen_L & (fate_L >= _MASKED) & (fate_L < _MASKED + _REPLACED)
    random_L = (uniform_L3[:, 2] * vocab_size).astype(np.int64)
    return MaskedText(np.where(replaced_L, random_L, masked_L), np.where(chosen_L, ids_L, IGNORED_LABEL))


def _digest(serialized: str) -> str:
    """SHA-256 of a tokenizer; padding and truncation are left out, as they only remember the last call."""
    rules = {key: value for key, value in json.loads(serialized).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
