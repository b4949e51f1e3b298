import json
import os

import pytest

from alpro_stream.errors import ManifestError
from alpro_stream.manifest import ManifestConfig, ManifestRow, RejectedRow, media_root, read_manifest


@pytest.fixture
def folder(tmp_path):
    """A folder inside of the test's one, so that linked things can lie outside."""
    path = tmp_path / "corpus"
    path.mkdir()
    return path


def write(folder, **files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_media_are_found_in_order_with_their_captions(folder):
    files = {
        "b.mp4": "", "b.txt": "a dog runs\n\n a dog\r\n",
        "a.JPG": "", "a.txt": "a cat",
        "z/c.webm": "",
        "z/c.json": json.dumps({"captions": ["a cow"], "qa": [{"question": "q", "answer": "a"}], "start_s": 1,
                                "split": "val", "license": "CC0", "media": "/etc/passwd"}),
        "a/d.e.mkv": "", "a/d.e.txt": "dots",
        "notes.txt": "not beside any medium", "table.csv": "x",
    }  # fmt: skip
    write(folder, **files)
    rows = list(read_manifest(folder))
    assert [(row.id, row.media, row.captions, row.kind, row.line) for row in rows] == [
        ("a.JPG", "a.JPG", ("a cat",), "image", 1),
        ("b.mp4", "b.mp4", ("a dog runs", "a dog"), "video", 2),
        ("a/d.e.mkv", "a/d.e.mkv", ("dots",), "video", 3),
        ("z/c.webm", "z/c.webm", ("a cow",), "video", 4),
    ]
    last = rows[-1]
    assert (last.qa, last.start_s, last.split, last.license) == ((("q", "a"),), 1.0, "val", "CC0")
    assert media_root(folder) == str(folder)


def test_files_as_img2dataset_leaves_them(folder):
    metadata = {"caption": "from json", "url": "https://x", "key": "000000001", "status": "success", "width": 3}
    write(folder, **{"1.jpg": "", "1.txt": "from txt", "1.json": json.dumps(metadata)})
    write(folder, **{"2.jpg": "", "2.txt": " \n", "2.json": json.dumps(metadata)})
    write(folder, **{"3.jpg": "", "3.json": json.dumps({**metadata, "caption": None})})
    first, second, third = read_manifest(folder, ManifestConfig(columns={"license": "url", "id": "{key}-{line}"}))
    assert (first.id, first.captions, first.license) == ("000000001-1", ("from txt",), "https://x")
    assert second.captions == ("from json",)
    assert "no caption" in third.reason


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no captions beside it; expected a.txt or a.json"),
        ({"a.txt": ""}, "no caption"),
        ({"a.txt": b"caf\xe9"}, "its .txt is not UTF-8 (byte 3)"),
        ({"a.txt": b"x" * 2_000_000}, "its .txt is longer than"),
        ({"a.json": "{"}, "its .json is not JSON"),
        ({"a.json": "[]"}, "its .json holds a list"),
        ({"a.json": '{"captions": "text"}'}, "expected a list of texts"),
        ({"a.json": '{"captions": ["c"], "split": "../x"}'}, "'split' is '../x'"),
    ],
)
def test_a_medium_whose_captions_cannot_be_read_is_rejected(folder, files, reason):
    write(folder, **{"a.mp4": "", "b.mp4": "", "b.txt": "good"}, **files)
    rejected, row = read_manifest(folder)
    assert isinstance(rejected, RejectedRow)
    assert (rejected.line, rejected.id) == (1, "a.mp4")
    assert reason in rejected.reason
    assert row.id == "b.mp4"


def test_linked_folders_and_hidden_files_are_left_out(tmp_path, folder):
    write(tmp_path / "elsewhere", **{"x.mp4": "", "x.txt": "x", "y.mp4": "", "y.txt": "y"})
    write(folder, **{"._a.mp4": "", ".trash/b.mp4": "", ".trash/b.txt": "b"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "y.mp4").symlink_to(tmp_path / "elsewhere" / "y.mp4")
    write(folder, **{"y.txt": "a linked file is fine"})
    assert [row.id for row in read_manifest(folder)] == ["y.mp4"]


def test_a_name_that_is_no_text_is_rejected_in_escapes(folder):
    with open(os.fsencode(folder) + b"/caf\xe9.mp4", "wb"), open(os.fsencode(folder) + b"/caf\xe9.txt", "wb") as file:  # noqa: PTH123
        file.write(b"coffee")
    (rejected,) = read_manifest(folder)
    assert isinstance(rejected, RejectedRow)
    assert rejected.id == "caf\\udce9.mp4"
    (rejected.id + rejected.reason).encode()


def test_a_folder_without_media_is_an_error(folder):
    write(folder, **{"a.txt": "a"})
    with pytest.raises(ManifestError, match="holds no videos or images"):
        list(read_manifest(folder))
    with pytest.raises(ManifestError, match="no such folder"):
        list(read_manifest(folder / "none", ManifestConfig(format="folder")))
    with pytest.raises(ManifestError, match=r"columns.media has no meaning for the format folder|columns.media cannot"):
        list(read_manifest(folder, ManifestConfig(columns={"media": "x"})))


def test_media_may_lie_elsewhere(folder):
    write(folder, **{"a.mp4": "", "a.txt": "a"})
    config = ManifestConfig(media_root="s3://bucket/corpus")
    (row,) = read_manifest(folder, config)
    assert isinstance(row, ManifestRow)
    assert (row.media, media_root(folder, config)) == ("a.mp4", "s3://bucket/corpus")
