import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from alpro_stream.errors import TokenizerError
from alpro_stream.stream.seeds import Draws
from alpro_stream.stream.text import IGNORED_LABEL, Tokenizer, mask_tokens
from alpro_stream.testing.shards import caption_of, write_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(str(directory), 12)


def test_captions_are_padded_and_cut(tokenizer):
    ids, mask = tokenizer(["a red dog", "a red dog moves " * 5])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [5, 12]
    assert ids[0, [0, 4]].tolist() == ids[1, [0, 11]].tolist() == [CLS, SEP]
    assert ids[0, 5:].eq(PAD).all()
    assert torch.equal(ids[0, 1:4], ids[1, 1:4])
    assert tokenizer(["a"], num_tokens=7)[0].shape == (1, 7)


def test_vocabulary(tokenizer, directory):
    assert tokenizer.vocab_size == len((directory / "vocab.txt").read_text().split())
    assert tokenizer.mask_id == MASK
    assert tokenizer(["zebra"])[0][0, 1] == UNK


def test_the_digest_is_of_the_rules_and_not_of_the_place(directory, tokenizer, tmp_path):
    tokenizer(["a call leaves padding and truncation behind in what is saved"])
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer(str(tmp_path / "saved"), 30)
    assert saved.digest == tokenizer.digest
    assert torch.equal(saved(["a red dog"], 12)[0], tokenizer(["a red dog"])[0])
    shutil.copytree(directory, tmp_path / "other")
    with (tmp_path / "other" / "vocab.txt").open("a") as file:
        file.write("zebra\n")
    assert Tokenizer(str(tmp_path / "other"), 12).digest != tokenizer.digest


def wordlevel(directory, special, **roles):
    directory.mkdir()
    words = {word: number for number, word in enumerate([*special, "a"])}
    RawTokenizer(models.WordLevel(words, unk_token=special[0])).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_without_mask_is_refused(tmp_path):
    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wordlevel(tmp_path / "x", ["[PAD]", "[CLS]", "[SEP]"], **roles)
    with pytest.raises(TokenizerError, match="has no mask_token_id; a BERT tokenizer is needed"):
        Tokenizer(str(tmp_path / "x"), 12)


@pytest.mark.parametrize(
    "contents",
    [
        None,
        {},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}"},
        {"tokenizer.json": '{"added_tokens": [], "model": {"type": "WordPiece", "vocab": 3}}'},
        {"tokenizer.json": '{"version": "1.0", "added_tokens": [], "model": {"type": "Nothing"}}'},
    ],
)
def test_a_missing_or_broken_tokenizer_is_named(tmp_path, contents):
    path = tmp_path / "nothing"
    if contents is not None:
        path.mkdir()
        for name, text in contents.items():
            (path / name).write_text(text)
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(str(path), 12)
    assert str(caught.value).startswith(f"no tokenizer at '{path}'")
    assert "\n" not in str(caught.value)


def test_masking_rates():
    ids = np.random.default_rng(0).integers(5, 1000, 200_000)
    masked = mask_tokens(ids, np.zeros(len(ids), bool), Draws("m").uniform(len(ids), 3), 0.15, MASK, 1000)
    chosen = masked.labels_L != IGNORED_LABEL
    assert abs(chosen.mean() - 0.15) < 0.005
    assert np.array_equal(masked.labels_L[chosen], ids[chosen])
    assert np.array_equal(masked.ids_L[~chosen], ids[~chosen])
    fates = masked.ids_L[chosen]
    assert abs((fates == MASK).mean() - 0.8) < 0.01
    assert abs((fates == ids[chosen]).mean() - 0.1) < 0.01
    replaced = fates[(fates != MASK) & (fates != ids[chosen])]
    assert replaced.min() < 20
    assert replaced.max() > 980
    assert abs(replaced.mean() - 500) < 25


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [
        ((0.14, 0.79, 0.5), MASK),
        ((0.14, 0.80, 0.5), 50),
        ((0.14, 0.89, 0.999), 99),
        ((0.14, 0.91, 0.5), 7),
        ((0.15, 0.10, 0.5), None),
    ],
)
def test_what_a_draw_means(uniform, expected):
    masked = mask_tokens(np.array([7]), np.array([False]), np.array([uniform]), 0.15, MASK, 100)
    if expected is None:
        assert (masked.ids_L.tolist(), masked.labels_L.tolist()) == ([7], [IGNORED_LABEL])
    else:
        assert (masked.ids_L.tolist(), masked.labels_L.tolist()) == ([expected], [7])


def test_special_tokens_are_never_chosen(tokenizer):
    ids = tokenizer(["a zebra [MASK] dog"])[0][0].numpy()
    masked = tokenizer.mask(ids, 1.0, Draws("all"))
    special = ids < 5
    assert special.sum() == 10
    assert (masked.labels_L[special] == IGNORED_LABEL).all()
    assert np.array_equal(masked.labels_L[~special], ids[~special])
    assert np.array_equal(masked.ids_L[special], ids[special])


def test_masking_does_not_depend_on_the_padding(tokenizer):
    for number in range(20):
        short, long = (tokenizer([caption_of(number)], length)[0][0].numpy() for length in (8, 30))
        masks = [tokenizer.mask(ids, 0.5, Draws("mlm", number)) for ids in (short, long)]
        assert np.array_equal(masks[0].ids_L, masks[1].ids_L[:8])
        assert np.array_equal(masks[0].labels_L, masks[1].labels_L[:8])


def test_the_input_is_left_alone(tokenizer):
    ids = tokenizer(["a red dog"])[0][0].numpy()
    before = ids.copy()
    tokenizer.mask(ids, 1.0, Draws(0))
    assert np.array_equal(ids, before)
