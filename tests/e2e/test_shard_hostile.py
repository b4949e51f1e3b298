"""A corpus that means harm: playlists, devices, pipes, names for a shell, keys that climb, markup in captions."""

import html
import os
import re

import av
import pytest
from media_files import constant_rate, write_image, write_video
from shard_runs import config_of, failures_of, samples_of, write_manifest

from alpro_sharding import shard
from alpro_stream.shards import ShardReader

pytestmark = pytest.mark.usefixtures("local_ray")

SHELL = "$(touch pwned) ; rm -rf x `touch pwned` | touch pwned.mp4"
SCRIPT = "<script>alert('a dog')</script><img src=x onerror=alert(1)>"
CLIMBING = "../../etc/passwd"
ODD_IDS = (CLIMBING, "/etc/passwd", "..", "a\\..\\b", "con.tar", "-rf", "a%2e%2e/b", ".hidden")


def write_playlists(folder):
    """Texts that make FFmpeg open another file, which is there and good, when it is asked to open them by name."""
    other = folder / "other.mp4"
    texts = {
        "concat.mp4": "ffconcat version 1.0\nfile 'other.mp4'\n",
        "absolute.mp4": f"ffconcat version 1.0\nfile '{other}'\n",
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n",
        "dash.mp4": f'<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation><BaseURL>{other}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "drawing.png": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{other}"/></svg>',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return sorted(texts)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    write_video(folder / "other.mp4", constant_rate(8, 4))
    write_image(folder / "picture.png")
    return folder


def everything_below(folder, out):
    """Every path below a folder but outside of `out`, with its size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if out not in (path, *path.parents):
            found[str(path)] = path.lstat().st_size
    return found


def row(row_id, media, caption="a dog on the grass", **fields):
    return {"id": row_id, "media": str(media), "captions": [caption], **fields}


def test_files_that_are_no_media_cost_their_row_only(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    playlists = write_playlists(corpus)
    (corpus / "zero.mp4").symlink_to("/dev/zero")
    os.mkfifo(corpus / "pipe.mp4")
    (corpus / "folder.mp4").mkdir()
    (corpus / "link.mp4").symlink_to("other.mp4")
    write_video(corpus / SHELL, constant_rate(8, 4))
    addresses = ("file:///etc/passwd.mp4", "concat:other.mp4|other.mp4", "pipe:0.mp4", "gopher://127.0.0.1/a.mp4")
    rows = [
        row("good", "other.mp4", SCRIPT),
        *(row(name, name) for name in playlists),
        *(row(name, name) for name in ("zero.mp4", "pipe.mp4", "folder.mp4")),
        row("link", "link.mp4"),
        row(SHELL, SHELL),
        *(row(address, address) for address in addresses),
        row("null", "other\0.mp4"),
        row("split", "other.mp4", split="../../outside"),
    ]
    manifest = write_manifest(corpus / "manifest.jsonl", *rows)
    out = tmp_path / "out/shards"
    before = everything_below(tmp_path, out.parent)
    shard(config_of(manifest, out, samples_per_shard=50))

    assert [metadata.id for metadata, _ in samples_of(out / "train")] == ["good", "link", SHELL]
    failures = {failure["id"]: (failure["stage"], failure["reason"]) for failure in failures_of(out)}
    assert len(failures) == len(rows) - 3
    for name in (*playlists, "zero.mp4", "pipe.mp4", "folder.mp4", "concat:other.mp4|other.mp4", "pipe:0.mp4"):
        assert failures[name][0] == "probe", name
    with av.open(corpus / "concat.mp4") as opened_by_name:
        assert opened_by_name.streams.video, "the trap is none: this build of FFmpeg does not know the playlist"
    assert "not one of the accepted formats" in failures["concat.mp4"][1]
    assert failures["zero.mp4"][1] == failures["pipe.mp4"][1] == failures["folder.mp4"][1] == "not a regular file"
    for name in ("file:///etc/passwd.mp4", "gopher://127.0.0.1/a.mp4", "null", "split"):
        assert failures[name][0] == "manifest", name
    assert everything_below(tmp_path, out.parent) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["shards"]
    assert (corpus / SHELL).is_file()
    refuse_markup((out / "report.html").read_text(encoding="utf-8"))
    refuse_markup((out / "README.md").read_text(encoding="utf-8"))


def test_keys_do_not_climb_out_of_the_target(corpus, tmp_path):
    manifest = write_manifest(corpus / "manifest.jsonl", *(row(name, "picture.png", SCRIPT) for name in ODD_IDS))
    out = tmp_path / "out/shards"
    before = everything_below(tmp_path, out.parent)
    shard(config_of(manifest, out, samples_per_shard=50))
    reader = ShardReader(out / "train")
    index = reader.index("image-000000")
    assert [reader.metadata("image-000000", slot).id for slot in range(len(index))] == list(ODD_IDS)
    for slot in range(len(index)):
        for member in index.members(slot):
            assert re.fullmatch(r"[A-Za-z0-9_-]+\.[a-z0-9.]+", member.name), member.name
    for path in out.rglob("*"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+", path.name), path
    assert everything_below(tmp_path, out.parent) == before
    page = (out / "report.html").read_text(encoding="utf-8")
    refuse_markup(page)
    assert html.escape("<script>alert(", quote=False) in page, "the caption is not shown at all"


def refuse_markup(page):
    assert "<script>alert" not in page
    assert "onerror=alert(1)>" not in page
