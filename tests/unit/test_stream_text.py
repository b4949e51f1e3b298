import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models
from transformers import AutoTokenizer

from alpro_stream.errors import TokenizerError
from alpro_stream.stream.seeds import Draws, sample_keys
from alpro_stream.stream.text import IGNORED_LABEL, Tokenizer, _is_wordwise, mask_tokens
from alpro_stream.testing.shards import caption_of, write_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(str(directory), 12)


@pytest.fixture(scope="module")
def reference(directory):
    """The ids of one text by transformers' own call, which pads and cuts one text at a time here."""
    tokenizer = AutoTokenizer.from_pretrained(str(directory))

    def encode(text, num_tokens):
        encoded = tokenizer(text, padding="max_length", truncation=True, max_length=num_tokens)
        return encoded["input_ids"], encoded["attention_mask"]

    return encode


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(["a", "red", "DOG", "moves", "zebra", "[MASK]", "[PAD]", "é", "犬", ","]), max_size=40
        ).map(" ".join),
    ),
    min_size=1,
    max_size=6,
)


def test_captions_are_padded_and_cut(tokenizer):
    ids, mask = tokenizer(["a red dog", "a red dog moves " * 5])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [5, 12]
    assert ids[0, [0, 4]].tolist() == ids[1, [0, 11]].tolist() == [CLS, SEP]
    assert ids[0, 5:].eq(PAD).all()
    assert torch.equal(ids[0, 1:4], ids[1, 1:4])
    assert tokenizer(["a"], num_tokens=7)[0].shape == (1, 7)


def test_words_that_are_kept_change_nothing(directory, monkeypatch):
    """Not those of other texts, not those that were dropped, not those that are too long to keep."""
    monkeypatch.setattr("alpro_stream.stream.text._MAX_WORDS", 3)
    texts = [
        "a red dog",
        "",
        "  a  dog ",
        "a red zebra " + "dog" * 30,
        "moves",
        "the dog moves red , a\tdog",
        "a red dog",
    ]
    kept = Tokenizer(str(directory), 12)
    for text in [*texts, *texts]:
        fresh = Tokenizer(str(directory), 12)([text])
        assert all(torch.equal(one, other) for one, other in zip(kept([text]), fresh, strict=True))


@pytest.mark.parametrize(
    ("change", "wordwise"),
    [
        ({}, True),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"post_processor": None}, False),
        ({"added_tokens": {"content": "red dog", "normalized": True, "special": False}}, False),
        ({"added_tokens": {"content": "dog", "lstrip": True, "special": False, "normalized": False}}, False),
    ],
)
def test_tokenizers_of_other_rules_are_asked_for_whole_texts(tokenizer, tmp_path, change, wordwise):
    tokenizer.save(tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    if "added_tokens" in change:
        token = {"id": tokenizer.vocab_size, "single_word": False, "lstrip": False, "rstrip": False}
        token |= change["added_tokens"]
        change = {"added_tokens": [*rules["added_tokens"], token]}
    raw = RawTokenizer.from_str(json.dumps({**rules, **change}))
    backend = SimpleNamespace(truncation_side="right", cls_token_id=CLS, sep_token_id=SEP)
    assert _is_wordwise(backend, raw) is wordwise


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


@pytest.mark.parametrize(
    "rule",
    [
        {"truncation_side": "left"},
        {"split_special_tokens": True},
        {"mask_token": "dog"},
        {"pad_token": "dog"},
        {"cls_token": "dog"},
        {"sep_token": "dog"},
        {"additional_special_tokens": ["dog"]},
    ],
)
def test_the_digest_holds_what_is_not_in_the_vocabulary(directory, tmp_path, rule):
    found = []
    for name, rules in (("plain", {}), ("other", rule)):
        place = shutil.copytree(directory, tmp_path / name)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**config, **rules}))
        found.append(Tokenizer(str(place), 12))
        found[-1].save(tmp_path / f"saved {name}")
        assert Tokenizer(str(tmp_path / f"saved {name}"), 30).digest == found[-1].digest
    assert found[0].digest != found[1].digest


def test_the_digest_holds_which_token_has_which_part(tmp_path):
    """Of one and the same tokenizer.json, which does not say it."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    digests = set()
    for number in range(4):
        parts = special[number:] + special[:number]
        roles = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token"), parts, strict=True))
        wordlevel(tmp_path / str(number), special, **roles)
        digests.add(Tokenizer(str(tmp_path / str(number)), 12).digest)
    assert len(digests) == 4


def test_the_digest_holds_which_tokens_are_never_masked(tmp_path):
    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    digests = set()
    for name, more in (("plain", {}), ("more", {"additional_special_tokens": ["a"]})):
        wordlevel(tmp_path / name, list(roles.values()), **roles, **more)
        raw = RawTokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        raw.add_special_tokens([*roles.values(), "a"])  # in both of them
        raw.save(str(tmp_path / name / "tokenizer.json"))
        digests.add(Tokenizer(str(tmp_path / name), 12).digest)
    assert len(digests) == 2


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


@given(texts=TEXTS, num_tokens=st.sampled_from([None, 3, 7, 12, 30]))
def test_ids_are_those_of_transformers(tokenizer, reference, texts, num_tokens):
    ids_BL, mask_BL = tokenizer(texts, num_tokens)
    assert ids_BL.dtype == mask_BL.dtype == torch.int64
    for text, ids, mask in zip(texts, ids_BL.tolist(), mask_BL.tolist(), strict=True):
        assert (ids, mask) == reference(text, num_tokens or 12)


def test_it_is_cut_at_the_side_it_says_and_padded_on_the_right(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "left")
    sides = {"tokenizer_class": "BertTokenizer", "truncation_side": "left", "padding_side": "left"}
    (tmp_path / "left" / "tokenizer_config.json").write_text(json.dumps(sides))
    left = Tokenizer(str(tmp_path / "left"), 4)
    words = {word: number for number, word in enumerate((directory / "vocab.txt").read_text().split())}
    assert left(["a red dog", "cat"])[0].tolist() == [
        [CLS, words["red"], words["dog"], SEP],
        [CLS, words["cat"], SEP, PAD],
    ]


def test_threads_with_other_lengths_do_not_disturb_each_other(directory):
    tokenizer = Tokenizer(str(directory), 30)
    texts = [f"{caption_of(number)} a red dog of the house" for number in range(64)]
    expected = {length: tokenizer(texts, length)[0] for length in (5, 9, 30)}
    fresh = Tokenizer(str(directory), 30)
    lengths = [5, 9, 30] * 60
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda length: fresh(texts, length)[0], lengths))
    assert all(torch.equal(ids, expected[length]) for ids, length in zip(found, lengths, strict=True))


def test_it_starts_no_threads_of_its_own_unless_told_to(directory, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    Tokenizer(str(directory), 12)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    Tokenizer(str(directory), 12)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_masking_rates():
    ids = np.random.default_rng(0).integers(5, 1000, 200_000)
    ids = ids.reshape(1000, 200)
    uniform = Draws("m").uniform(1000, 200, 3)
    masked = mask_tokens(ids, np.zeros(ids.shape, bool), uniform, 0.15, MASK, 1000)
    chosen = masked.labels_BL != IGNORED_LABEL
    assert abs(chosen.mean() - 0.15) < 0.005
    assert np.array_equal(masked.labels_BL[chosen], ids[chosen])
    assert np.array_equal(masked.ids_BL[~chosen], ids[~chosen])
    fates = masked.ids_BL[chosen]
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
    masked = mask_tokens(np.array([[7]]), np.array([[False]]), np.array([[uniform]]), 0.15, MASK, 100)
    label = IGNORED_LABEL if expected is None else 7
    assert (masked.ids_BL.tolist(), masked.labels_BL.tolist()) == ([[expected or 7]], [[label]])


def keys_of(*numbers):
    return sample_keys([(number,) for number in numbers], "mlm")


def test_special_tokens_are_never_chosen(tokenizer):
    ids = tokenizer(["a zebra [MASK] dog", ""])[0].numpy()
    masked = tokenizer.mask(ids, keys_of(1, 2), 1.0)
    special = ids < 5
    assert special.sum(axis=1).tolist() == [10, 12]
    assert (masked.labels_BL[special] == IGNORED_LABEL).all()
    assert np.array_equal(masked.labels_BL[~special], ids[~special])
    assert np.array_equal(masked.ids_BL[special], ids[special])


def test_a_batch_is_masked_at_the_rates_of_one_text(tokenizer):
    """Through keys and positions, where the test above draws for itself."""
    ids = np.full((2000, 30), 7)
    masked = tokenizer.mask(ids, keys_of(*range(2000)), 0.15)
    chosen = masked.labels_BL != IGNORED_LABEL
    # 60,000 tokens: the standard deviation of the share is 0.0015; of a position (2000) and of a text (30) more.
    assert abs(chosen.mean() - 0.15) < 5 * 0.0015
    assert np.abs(chosen.mean(axis=0) - 0.15).max() < 5 * 0.008
    assert abs(chosen.sum(axis=1).var() - 30 * 0.15 * 0.85) < 0.5
    assert abs((masked.ids_BL[chosen] == MASK).mean() - 0.8) < 0.025
    assert chosen[:, :-1][chosen[:, 1:]].mean() == pytest.approx(0.15, abs=0.025)


@given(data=st.data(), numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True))
def test_a_text_is_masked_as_if_it_were_alone(tokenizer, data, numbers):
    """Neither the order of the batch, nor the other texts, nor the padding change what happens to a token."""
    probability = data.draw(st.sampled_from([0.15, 0.5, 1.0]))
    alone = {}
    for number in numbers:
        ids = tokenizer([caption_of(number)], 8)[0].numpy()
        masked = tokenizer.mask(ids, keys_of(number), probability)
        alone[number] = [*masked.ids_BL.tolist(), *masked.labels_BL.tolist()]
    shuffled = data.draw(st.permutations(numbers + data.draw(st.lists(st.integers(10**6 + 1, 10**7), max_size=3))))
    length = data.draw(st.sampled_from([8, 12, 30]))
    ids = tokenizer([caption_of(number) for number in shuffled], length)[0].numpy()
    together = tokenizer.mask(ids, keys_of(*shuffled), probability)
    for row, number in enumerate(shuffled):
        if number in alone:
            assert [together.ids_BL[row, :8].tolist(), together.labels_BL[row, :8].tolist()] == alone[number]
    assert np.array_equal(together.ids_BL[:, 8:], ids[:, 8:])
    assert (together.labels_BL[:, 8:] == IGNORED_LABEL).all()


def test_equal_texts_of_two_samples_are_masked_differently(tokenizer):
    ids = tokenizer(["a red dog moves"] * 50)[0].numpy()
    labels = tokenizer.mask(ids, keys_of(*range(50)), 0.5).labels_BL
    # Of 4 tokens there are 16 choices: all but a few of them in 50 draws.
    assert len(np.unique(labels, axis=0)) > 10


def test_the_input_is_left_alone(tokenizer):
    ids = tokenizer(["a red dog"])[0].numpy()
    before = ids.copy()
    tokenizer.mask(ids, keys_of(0), 1.0)
    assert np.array_equal(ids, before)
