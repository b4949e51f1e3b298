import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.errors import ManifestError
from alpro_stream.manifest import QA, ManifestRow, RejectedRow, read_manifest, sample_key

GOOD = {"id": "a", "media": "a.mp4", "captions": ["a dog runs"]}


def read(tmp_path, *lines):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return list(read_manifest(path))


def test_a_full_row_is_read(tmp_path):
    row = {
        "id": "a/1",
        "media": "clips/a.webm",
        "captions": ["a dog  runs\nfast", "ein Hund läuft"],
        "qa": [{"question": "what runs", "answer": "a dog"}],
        "start_s": 1,
        "end_s": 2.5,
        "split": "val",
        "kind": "video",
    }
    assert read(tmp_path, row) == [
        ManifestRow(
            id="a/1",
            media="clips/a.webm",
            captions=("a dog runs fast", "ein Hund läuft"),
            qa=(QA("what runs", "a dog"),),
            start_s=1.0,
            end_s=2.5,
            split="val",
            kind="video",
            line=1,
        )
    ]


@pytest.mark.parametrize(("media", "kind"), [("a.mp4", "video"), ("b/c.JPEG", "image"), ("noext", "video")])
def test_defaults(tmp_path, media, kind):
    (row,) = read(tmp_path, {**GOOD, "media": media, "duration_s": "an unknown key is ignored"})
    assert (row.split, row.kind, row.qa, row.start_s, row.end_s) == ("train", kind, (), None, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json at all", "not JSON"),
        (b'{"id": "v1", "captions": ["unterminated', "not JSON"),
        (b'["a list"]', "expected a JSON object, found a list"),
        (b'{"id": "\xff\xfe"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        ({"media": "a.mp4", "captions": ["x"]}, "no 'id'"),
        ({**GOOD, "id": 7}, "'id' is 7"),
        ({**GOOD, "id": "  "}, "not empty"),
        ({"id": "a", "captions": ["x"]}, "no 'media'"),
        ({**GOOD, "captions": []}, "no caption"),
        ({"id": "a", "media": "a.mp4"}, "no caption"),
        ({**GOOD, "captions": "a dog"}, "expected a list of texts"),
        ({**GOOD, "captions": ["a dog", " "]}, "empty text"),
        ({**GOOD, "captions": [3]}, "holds 3"),
        ({**GOOD, "captions": ["lone \ud800 surrogate"]}, "lone surrogate"),
        ({**GOOD, "qa": [{"question": "who"}]}, "'answer'"),
        ({**GOOD, "qa": ["who"]}, "'qa' is"),
        ({**GOOD, "start_s": -1}, "'start_s' is -1"),
        ({**GOOD, "start_s": True}, "'start_s' is True"),
        ({**GOOD, "end_s": 10**400}, "'end_s' is"),
        (b'{"id": "a", "media": "a.mp4", "captions": ["x"], "start_s": NaN}', "'start_s' is nan"),
        ({**GOOD, "start_s": 3, "end_s": 3}, "'end_s' is 3.0"),
        ({**GOOD, "split": "../escape"}, "'split' is '../escape'"),
        ({**GOOD, "kind": "audio"}, "'kind' is 'audio'"),
        ({**GOOD, "captions": ["x" * 2_000_000]}, "longer than"),
    ],
)
def test_a_bad_row_is_rejected_and_the_next_one_read(tmp_path, line, reason):
    rejected, row = read(tmp_path, line, {**GOOD, "id": "b"})
    assert isinstance(rejected, RejectedRow)
    assert rejected.line == 1
    assert reason in rejected.reason
    assert len(rejected.reason) < 300
    assert isinstance(row, ManifestRow)
    assert (row.id, row.line) == ("b", 2)


def test_of_two_rows_with_one_id_the_first_stands(tmp_path):
    first, empty_skipped, second = read(tmp_path, GOOD, b"", {**GOOD, "id": "b"}, {**GOOD, "media": "z.mp4"})
    assert (first.line, empty_skipped.line) == (1, 3)
    assert second == RejectedRow(4, "a", "duplicate id 'a': first used on line 1")


def test_a_byte_order_mark_is_no_error(tmp_path):
    (row,) = read(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert row.id == "a"


def test_a_missing_manifest_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        list(read_manifest(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("row_id", "key"),
    [
        ("v001", "v001"),
        ("a_b-C9", "a_b-C9"),
        ("a/b.c", "a_x2f_b_x2e_c"),
        ("_x2f_", "_x5f_x2f_"),
        ("é", "_xe9_"),
        ("../../etc/passwd", "_x2e__x2e__x2f__x2e__x2e__x2f_etc_x2f_passwd"),
    ],
)
def test_sample_keys(row_id, key):
    assert sample_key(row_id) == key


def test_long_ids_get_short_keys_that_differ():
    keys = {sample_key("a" * 200 + end) for end in ("1", "2")}
    assert len(keys) == 2
    assert all(len(key) <= 80 for key in keys)


@given(st.lists(st.text(alphabet="_xha2f./é5", max_size=8), unique=True, min_size=2, max_size=50))
def test_different_ids_have_different_safe_keys(ids):
    keys = [sample_key(row_id) for row_id in ids]
    assert len(set(keys)) == len(ids)
    assert all(set(key) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-") for key in keys)
