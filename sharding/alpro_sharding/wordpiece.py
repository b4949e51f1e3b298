"""Trains a BERT WordPiece vocabulary on texts and writes a directory that `transformers` loads."""

import json
import os
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from alpro_stream.shards.storage import publish_bytes

TOKENIZER_FOLDER = "tokenizer"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_POSITIONS = 512
# Often enough that the words of extra texts become single tokens in any corpus that is small.
_EXTRA_WEIGHT = 100
# Every letter and digit, alone and inside a word: a word that the corpus lacks is spelled out, not [UNK].
_ALPHABET = tuple(prefix + c for prefix in ("", "##") for c in string.ascii_lowercase + string.digits)
_CONFIG = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "model_max_length": MAX_POSITIONS,
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_wordpiece(texts: Iterable[str], vocab_size: int, extra_texts: Iterable[str] = ()) -> Tokenizer:
    """Trains a lower-casing BERT tokenizer; the same texts give the same vocabulary.

    Args:
        texts: the corpus.
        vocab_size: most entries; ids 0 to 4 are [PAD], [UNK], [CLS], [SEP] and [MASK].
        extra_texts: texts whose words must be in the vocabulary, such as prompt templates.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = _count_words(texts)
    for word, count in _count_words(extra_texts).items():
        words[word] += count * _EXTRA_WEIGHT
    # The trainer numbers letters as a hash map yields them and breaks ties by number; given as special tokens, in
    # order, they have the same numbers in every run.
    letters = sorted({*_ALPHABET, *(piece for word in words for piece in _pieces(word))})
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *letters],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained = _bert_tokenizer(WordPiece(unk_token="[UNK]"))
    trained.train_from_iterator((word for word, count in sorted(words.items()) for _ in range(count)), trainer)
    return _bert_tokenizer(WordPiece(trained.get_vocab(), unk_token="[UNK]"))


def _count_words(texts: Iterable[str]) -> Counter[str]:
    splitter = _bert_tokenizer(WordPiece(unk_token="[UNK]"))
    words: Counter[str] = Counter()
    for text in texts:
        normal = splitter.normalizer.normalize_str(text)
        words.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    return words


def _pieces(word: str) -> list[str]:
    """The letters of a word as vocabulary entries: ``["c", "##a", "##t"]``."""
    return [word[0], *(f"##{letter}" for letter in word[1:])]


def _bert_tokenizer(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    cls, sep = (("[CLS]", SPECIAL_TOKENS.index("[CLS]")), ("[SEP]", SPECIAL_TOKENS.index("[SEP]")))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes ``tokenizer.json``, ``vocab.txt`` and ``tokenizer_config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    publish_bytes(directory / "vocab.txt", "".join(f"{token}\n" for token, _ in vocabulary).encode("utf-8"))
    publish_bytes(directory / "tokenizer.json", tokenizer.to_str(pretty=True).encode("utf-8"))
    publish_bytes(directory / "tokenizer_config.json", (json.dumps(_CONFIG, indent=2) + "\n").encode("utf-8"))
