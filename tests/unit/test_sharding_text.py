import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from alpro_sharding.entities import count_nouns
from alpro_sharding.wordpiece import SPECIAL_TOKENS, save_tokenizer, train_wordpiece

CAPTIONS = [
    "Two dogs play on the grass",
    "A dog catches a ball next to a parked bus",
    "Buses wait in front of a glass building",
    "A woman pours water into three glasses",
]


def test_nouns_are_counted_by_their_singular():
    counts = count_nouns(CAPTIONS)
    assert counts["dog"] == 2
    assert counts["bus"] == 2
    assert counts["glass"] == 2
    assert counts["woman"] == 1
    assert not {"dogs", "bu", "glas", "the", "two", "pours", "front"} & set(counts)


def test_vague_nouns_and_scraps_are_left_out():
    assert set(count_nouns(["A video clip of a cat", "footage in the background", "x 3 %% ab <b>", ""])) == {"cat"}


def test_a_capital_letter_changes_nothing():
    assert count_nouns(["Hands hold cups"]) == count_nouns(["hands hold cups"])


@pytest.mark.parametrize("loader", [AutoTokenizer, BertTokenizerFast])
def test_transformers_loads_the_trained_tokenizer(tmp_path, loader):
    save_tokenizer(train_wordpiece(CAPTIONS, 400, ("a video of footage",)), tmp_path)
    tokenizer = loader.from_pretrained(str(tmp_path))
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.tokenize("A Video of FOOTAGE") == ["a", "video", "of", "footage"]
    encoded = tokenizer("two dogs", padding="max_length", max_length=8, truncation=True)
    assert encoded["input_ids"][0] == tokenizer.cls_token_id
    assert encoded["input_ids"][-1] == 0
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "two dogs"
    assert len(tokenizer) == len((tmp_path / "vocab.txt").read_text().splitlines())


def test_unseen_words_are_spelled_out():
    tokens = train_wordpiece(CAPTIONS, 400).encode("xylophone 42 Ünïcode").tokens
    assert "[UNK]" not in tokens


def test_the_vocabulary_keeps_to_its_size():
    assert train_wordpiece(CAPTIONS * 3, 256).get_vocab_size() <= 256


def test_the_same_texts_give_the_same_vocabulary_in_another_process():
    script = (
        "import sys, json; from alpro_sharding.wordpiece import train_wordpiece;"
        "print(json.dumps(sorted(train_wordpiece(json.loads(sys.argv[1]), 300).get_vocab().items())))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script, json.dumps(CAPTIONS)], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert len(json.loads(runs.pop())) > 72
