"""Captions to token ids, and MLM's masking of them. Tensors: B batch, L tokens."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import AutoTokenizer

from alpro_stream.config import Config
from alpro_stream.errors import TokenizerError
from alpro_stream.stream.seeds import uniform_at

IGNORED_LABEL = -100
_MASKED, _REPLACED = 0.8, 0.1
# Of words whose tokens are kept, and characters of one: some 10 MB, and nearly all words of captions.
_MAX_WORDS, _MAX_WORD_CHARS = 50_000, 32
_ROLES = ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


class TextConfig(Config):
    """How captions become tokens."""

    tokenizer: str
    """A directory with a BERT WordPiece tokenizer, or a name on the hub such as bert-base-uncased."""
    num_tokens: int = Field(default=30, ge=3)
    """Length every caption is cut or padded to, CLS and SEP included."""
    mlm_probability: float = Field(default=0.15, ge=0, le=1)
    """Share of the tokens that MLM hides and predicts."""


@dataclass(frozen=True, slots=True)
class MaskedTexts:
    """MLM's input and targets: `ids_BL` with some tokens hidden, `labels_BL` -100 where nothing is predicted."""

    ids_BL: NDArray[np.int64]
    labels_BL: NDArray[np.int64]


class Tokenizer:
    """A BERT WordPiece tokenizer with a fixed length; several threads may use it at once.

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
        for name in _ROLES:
            if getattr(self._tokenizer, name, None) is None:
                raise TokenizerError(f"the tokenizer at {source!r} has no {name}; a BERT tokenizer is needed")
        if not self._tokenizer.is_fast:
            raise TokenizerError(f"the tokenizer at {source!r} has no tokenizer.json; save it with its fast version")
        self.num_tokens = num_tokens
        self.vocab_size = len(self._tokenizer)
        self.digest = _digest(self._tokenizer)
        self._pad_id, self._cls_id, self._sep_id, self.mask_id = (
            int(getattr(self._tokenizer, name)) for name in _ROLES
        )
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[list(self._tokenizer.all_special_ids)] = True
        self._copies: dict[int, tokenizers.Tokenizer] = {}
        self._words = _Words(self._copy()) if _is_wordwise(self._tokenizer, self._copy()) else None
        # Its own threads would be one a core on every rank, for a few milliseconds of work beside those that decode.
        # Some versions also warn whoever forks after they ran.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __call__(self, texts: Sequence[str], num_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask of the texts, both (B, L) int64; longer texts are cut."""
        length = num_tokens or self.num_tokens
        if self._words is not None and length > 2:
            ids_BL, mask_BL = self._join(self._words.tokens_of(texts), length)
            return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)
        # Without transformers' wrapper, which adds half the time again; the fast variant leaves out the offsets.
        encodings = self._with_length(length).encode_batch_fast(list(texts))
        ids, mask = [encoding.ids for encoding in encodings], [encoding.attention_mask for encoding in encodings]
        return torch.from_numpy(np.array(ids, dtype=np.int64)), torch.from_numpy(np.array(mask, dtype=np.int64))

    def mask(self, ids_BL: NDArray[np.int64], keys_B: NDArray[np.uint64], probability: float) -> MaskedTexts:
        """Hides tokens of a batch of texts for MLM.

        What happens to a token depends on its text's key and on its position alone, neither on the padding nor on the
        other texts.

        Args:
            ids_BL: token ids, as `__call__` gives them.
            keys_B: one a text, from `alpro_stream.stream.seeds.sample_keys`.
            probability: share of the tokens that is chosen.
        """
        # Three draws a position, laid out position by position: padding cannot shift them.
        uniform_BL3 = uniform_at(keys_B, 3 * ids_BL.shape[1]).reshape(*ids_BL.shape, 3)
        special_BL = self._is_special[ids_BL]
        return mask_tokens(ids_BL, special_BL, uniform_BL3, probability, self.mask_id, self.vocab_size)

    def token_of(self, word: str) -> int | None:
        """The id of a word that is one token; None where it is several, or unknown."""
        ids = self._tokenizer.encode(word, add_special_tokens=False)
        return int(ids[0]) if len(ids) == 1 and not self._is_special[ids[0]] else None

    def save(self, directory: Path) -> None:
        """Writes the tokenizer so that its directory can be given as the source."""
        self._tokenizer.save_pretrained(str(directory))

    def _with_length(self, num_tokens: int) -> tokenizers.Tokenizer:
        """A copy for this length: transformers sets the length of its only one, under the hands of other threads."""
        if num_tokens not in self._copies:
            copy = self._copy()
            copy.enable_truncation(num_tokens, direction=self._tokenizer.truncation_side)
            # On the right, whatever this tokenizer is used to: the encoders look for CLS at the beginning.
            pad_id, pad_token = self._tokenizer.pad_token_id, self._tokenizer.pad_token
            copy.enable_padding(length=num_tokens, pad_id=pad_id, pad_token=pad_token)
            self._copies[num_tokens] = copy
        return self._copies[num_tokens]

    def _copy(self) -> tokenizers.Tokenizer:
        """The tokenizer without transformers' wrapper, that cuts and pads nothing."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = self._tokenizer.split_special_tokens
        copy.no_truncation()
        copy.no_padding()
        return copy

    def _join(self, tokens: Sequence[list[int]], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask, (B, length), of texts that are cut and get CLS, SEP and padding."""
        rows = [[self._cls_id, *own[: length - 2], self._sep_id] for own in tokens]
        mask_BL = np.arange(length) < np.array([len(row) for row in rows])[:, None]
        ids_BL = np.full(mask_BL.shape, self._pad_id, dtype=np.int64)
        ids_BL[mask_BL] = list(chain.from_iterable(rows))
        return ids_BL, mask_BL.astype(np.int64)


class _Words:
    """The tokens of words, by what lies between single spaces; each is looked up once, as most of them come often.

    Args:
        tokenizer: one of `_is_wordwise`, which cuts and pads nothing.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without CLS and SEP."""
        split = [text.split(" ") for text in texts]
        if len(self._known) > _MAX_WORDS:
            self._known = {}  # not emptied: another thread may be in the middle of using it
        known = self._known
        distinct = set(chain.from_iterable(split))
        if new := distinct.difference(known):
            words = list(new)
            encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
            found = {word: encoding.ids for word, encoding in zip(words, encodings, strict=True)}
            known.update({word: ids for word, ids in found.items() if len(word) <= _MAX_WORD_CHARS})
            known = {word: known[word] for word in distinct.difference(new)} | found
        return [list(chain.from_iterable(map(known.__getitem__, words))) for words in split]


def _is_wordwise(tokenizer: Any, copy: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of a text are those of its words one after the other, between CLS and SEP.

    So it is with BERT's own rules, which look at nothing beyond a space, unless an added token does.

    Args:
        tokenizer: that of transformers.
        copy: the same without that wrapper.
    """
    rules = json.loads(copy.to_str())
    types = [(rules[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    if types != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or tokenizer.truncation_side != "right":
        return False
    if any(len(one["content"].split()) != 1 or one["lstrip"] or one["rstrip"] for one in rules["added_tokens"]):
        return False
    alone, within = (copy.encode("a", add_special_tokens=special).ids for special in (False, True))
    return bool(within == [tokenizer.cls_token_id, *alone, tokenizer.sep_token_id])


def mask_tokens(
    ids_BL: NDArray[np.int64],
    special_BL: NDArray[np.bool_],
    uniform_BL3: NDArray[np.float64],
    probability: float,
    mask_id: int,
    vocab_size: int,
) -> MaskedTexts:
    """BERT's masking: of the chosen tokens 80 % become MASK, 10 % any token, 10 % stay (Devlin et al. 2019).

    Args:
        ids_BL: token ids.
        special_BL: positions that are never chosen (CLS, SEP, padding, ...).
        uniform_BL3: draws in [0, 1): chosen at all, what happens to it, which token instead.
        probability: share of the tokens that is chosen.
        mask_id: id of MASK.
        vocab_size: the random token is uniform over all ids.
    """
    select_BL, fate_BL, which_BL = np.moveaxis(uniform_BL3, -1, 0)
    chosen_BL = (select_BL < probability) & ~special_BL
    masked_BL = np.where(chosen_BL & (fate_BL < _MASKED), mask_id, ids_BL)
    replaced_BL = chosen_BL & (fate_BL >= _MASKED) & (fate_BL < _MASKED + _REPLACED)
    random_BL = (which_BL * vocab_size).astype(np.int64)
    return MaskedTexts(np.where(replaced_BL, random_BL, masked_BL), np.where(chosen_BL, ids_BL, IGNORED_LABEL))


def _digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer; padding and truncation are left out, as they only remember the last call."""
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in serialized.items() if key not in ("padding", "truncation")}
    # What transformers keeps beside those rules, and `Tokenizer` goes by.
    beside = {name: getattr(tokenizer, name) for name in ("truncation_side", "split_special_tokens", *_ROLES)}
    rules["beside"] = {**beside, "special_ids": sorted(tokenizer.all_special_ids)}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
