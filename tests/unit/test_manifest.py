import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, ManifestError
from alpro_stream.manifest import (
    QA,
    ManifestConfig,
    ManifestRow,
    RejectedRow,
    kind_of,
    media_place,
    media_root,
    public_place,
    read_manifest,
    sample_key,
)

GOOD = {"id": "a", "media": "a.mp4", "captions": ["a dog runs"]}


def read(tmp_path, *lines, **config):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return list(read_manifest(path, ManifestConfig(**config)))


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
        "license": "CC BY 4.0",
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
            license="CC BY 4.0",
        )
    ]


@pytest.mark.parametrize(("media", "kind"), [("a.mp4", "video"), ("b/c.JPEG", "image"), ("noext", "video")])
def test_defaults(tmp_path, media, kind):
    (row,) = read(tmp_path, {**GOOD, "media": media, "duration_s": "an unknown key is ignored"})
    assert (row.split, row.kind, row.qa, row.start_s, row.end_s) == ("train", kind, (), None, None)
    assert (row.byte_range, row.license) == (None, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json at all", "not JSON"),
        (b'{"id": "v1", "captions": ["unterminated', "not JSON: Unterminated string starting at character 27"),
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
        ({**GOOD, "captions": ["x" * 10_000_000]}, "longer than"),
        ({**GOOD, "captions": ["nul \0"]}, "NUL"),
        ({**GOOD, "license": ["a", "b"]}, "'license' holds"),
        ({**GOOD, "media": "gs://bucket/a.mp4"}, "begins with http://, https://, s3://"),
        ({**GOOD, "media": "file:///etc/passwd"}, "begins with http://"),
        ({**GOOD, "media": "concat://a|b"}, "begins with http://"),
        ({**GOOD, "media": "gs://b/a.mp4?signed=secret"}, "'media' is 'gs://b/a.mp4'; expected a path"),
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


def test_empty_lines_are_counted_and_skipped(tmp_path):
    rows = read(tmp_path, GOOD, b"", b"  \t", {**GOOD, "id": "a"})
    assert [(row.id, row.line) for row in rows] == [("a", 1), ("a", 4)]  # duplicates are found elsewhere


@pytest.mark.parametrize(
    "media",
    [
        "http://h/a.mp4",
        "HTTP://h/a.mp4",
        "https://h/a.mp4?x=1",
        "https://h?at=a@b",
        "https://h/@user/a.mp4",
        "s3://bucket/key/a@b.mp4",
        "S3://bucket/a.mp4",
        "/abs/a.mp4",
        "../a",
        "name:word@h/a.mp4",
    ],
)
def test_media_may_be_addresses_or_lie_anywhere(tmp_path, media):
    (row,) = read(tmp_path, {**GOOD, "media": media})
    assert row.media == media


@pytest.mark.parametrize(
    "media",
    [
        "http://name:word@h/a.mp4",
        "HTTPS://word@h:80/a.mp4",
        "s3://name:word@bucket/a.mp4",
        "http://name:w@word@h/a.mp4",
        "gs://name:word@bucket/a.mp4",
    ],
)
def test_passwords_in_addresses_are_refused_and_not_repeated(tmp_path, media):
    reason = "'media' holds a user name or password; give credentials in the environment"
    assert read(tmp_path, {**GOOD, "media": media}) == [RejectedRow(1, "a", reason)]
    (tmp_path / "m.json").write_text(json.dumps([{"video": media, "caption": "a dog"}]))
    assert list(read_manifest(tmp_path / "m.json", ManifestConfig(format="lavis"))) == [RejectedRow(1, None, reason)]
    with pytest.raises(ConfigError, match="media_root holds a user name or password; give") as caught:
        validate(ManifestConfig, {"media_root": media}, "test")
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize(
    ("media", "published"),
    [
        ("clips/a.mp4", "clips/a.mp4"),
        ("/data/a b?c#d@e.mp4", "/data/a b?c#d@e.mp4"),
        ("https://h:8080/a/b.mp4", "https://h:8080/a/b.mp4"),
        ("https://h/a.mp4?X-Amz-Signature=secret", "https://h/a.mp4"),
        ("https://h/a.mp4#secret?secret\nsecret", "https://h/a.mp4"),
        ("https://h?secret=a@b", "https://h"),
        ("s3://bucket/a@b.mp4?secret", "s3://bucket/a@b.mp4"),
        ("HTTP://name:secret@h:80/@user/a.mp4?secret", "HTTP://h:80/@user/a.mp4"),
        ("http://name:sec@ret@h/a.mp4", "http://h/a.mp4"),
    ],
)
def test_what_is_published_of_a_place_holds_no_secret(media, published):
    assert public_place(media) == published


def test_keys_are_mapped_and_the_others_keep_their_names(tmp_path):
    line = {"video_id": 7, "path": "v/7.mp4", "caption": "a dog", "split": "val", "from": "2.5", "lic": 3}
    columns = {"id": "clip-{video_id}", "media": "path", "captions": "caption", "start_s": "from", "license": "lic"}
    (row,) = read(tmp_path, line, columns=columns)
    assert (row.id, row.media, row.captions, row.split) == ("clip-7", "v/7.mp4", ("a dog",), "val")
    assert (row.start_s, row.license) == (2.5, "3")


def test_several_columns_are_all_captions_and_the_first_of_other_fields(tmp_path):
    columns = {"id": ["name", "n{line}"], "media": "{dir}/{line}.mp4", "captions": ["long", "alt", "tags", "none"]}
    lines = [
        {"name": "a", "dir": "d", "long": "a dog", "alt": "", "tags": ["one", "two"]},
        {"dir": "d", "long": "a cat"},
        {"name": "c", "long": "a cow"},
    ]
    first, second, third = read(tmp_path, *lines, columns=columns)
    assert (first.id, first.captions) == ("a", ("a dog", "one", "two"))
    assert (second.id, second.media, second.captions) == ("n2", "d/2.mp4", ("a cat",))
    assert third == RejectedRow(3, "c", "'media' is made of '{dir}/{line}.mp4', where 'dir' is None")


def test_templates_replace_names_and_do_nothing_else(tmp_path):
    line = {"a": "x", "a.b": "dotted", "a!r": "bang", "a:3": "colon", "captions": ["c"]}
    (row,) = read(tmp_path, line, columns={"id": "{a}-{a.b}-{a!r}-{a:3}-}", "media": "m{{a}}"})
    assert (row.id, row.media) == ("x-dotted-bang-colon-}", "m{x}")


def test_splits_come_from_lists_rows_and_the_default(tmp_path):
    for name, ids in (("val.txt", "b\n\n d \n"), ("test.txt", "e\n")):
        (tmp_path / name).write_text(ids)
    lines = [{**GOOD, "id": row_id, "split": "dev" if row_id in "bc" else None} for row_id in "abcde"]
    splits = {"val": str(tmp_path / "val.txt"), "test": str(tmp_path / "test.txt")}
    rows = read(tmp_path, *lines, split="pool", splits=splits)
    assert [row.split for row in rows] == ["pool", "val", "dev", "val", "test"]


def test_an_id_in_two_lists_is_an_error(tmp_path):
    for name in ("val.txt", "test.txt"):
        (tmp_path / name).write_text("x\nb\n" if name == "val.txt" else "b\n")
    splits = {"val": str(tmp_path / "val.txt"), "test": str(tmp_path / "test.txt")}
    with pytest.raises(ManifestError, match=r"test.txt, line 1: 'b' is in the list of 'val' too"):
        read(tmp_path, GOOD, splits=splits)
    with pytest.raises(ManifestError, match=r"cannot read .*none.txt"):
        read(tmp_path, GOOD, splits={"val": str(tmp_path / "none.txt")})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"columns": {"caption": "name"}}, "unknown field 'caption'; did you mean 'captions'"),
        ({"columns": {"xyz": "name"}}, "known fields: id, media"),
        ({"columns": {"captions": []}}, "no column for 'captions'"),
        ({"format": "excel"}, "format"),
        ({"media_root": "gs://bucket"}, "media_root is 'gs://bucket'; expected a folder, or .* with http, https, s3"),
        ({"split": "a/b"}, "split"),
        ({"splits": {"../x": "list.txt"}}, "cannot name a split"),
        ({"colums": {}}, "did you mean 'columns'"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(ManifestConfig, config, "test")


def test_relative_media_start_from_the_manifest_or_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.jsonl").touch()
    assert media_root("sub/m.jsonl") == str(tmp_path / "sub")
    assert media_root("sub") == str(tmp_path / "sub")
    assert media_root("sub/{000..123}/*.tar") == str(tmp_path / "sub")
    assert media_root("sub/m.jsonl", ManifestConfig(media_root="videos")) == str(tmp_path / "videos")
    assert media_root("sub/m.jsonl", ManifestConfig(media_root="s3://b/p/")) == "s3://b/p/"
    assert media_root("sub/m.jsonl", ManifestConfig(media_root="HTTPS://h")) == "HTTPS://h"


@pytest.mark.parametrize(
    ("root", "media", "place"),
    [
        ("/data", "a/b.mp4", "/data/a/b.mp4"),
        ("/data", "/x/b.mp4", "/x/b.mp4"),
        ("/data", "https://h/b.mp4", "https://h/b.mp4"),
        ("s3://b/p/", "a/b.mp4", "s3://b/p/a/b.mp4"),
        ("https://h", "b.mp4", "https://h/b.mp4"),
        ("https://h", "/x/b.mp4", "/x/b.mp4"),
    ],
)
def test_media_places(root, media, place):
    assert media_place(root, media) == place


@pytest.mark.parametrize(
    ("media", "kind"),
    [
        ("https://h/a.jpg?width=9", "image"),
        ("https://h/get?f=a.jpg", "video"),
        ("a?b.png", "image"),
        ("a.JPG#x", "video"),
    ],
)
def test_of_an_address_the_query_is_no_part_of_the_name(media, kind):
    assert kind_of(media) == kind


@pytest.mark.parametrize("name", ["captions.json", "captions.txt", "captions"])
def test_a_file_of_no_known_suffix_needs_a_format(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(GOOD))
    with pytest.raises(ManifestError, match=r"set reading.format to one of jsonl, csv, .*webdataset"):
        list(read_manifest(tmp_path / name))
    (row,) = read_manifest(tmp_path / name, ManifestConfig(format="jsonl"))
    assert row.id == "a"


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(ManifestError, match="is a folder; a manifest of the format csv is a file"):
        list(read_manifest(tmp_path, ManifestConfig(format="csv")))


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
