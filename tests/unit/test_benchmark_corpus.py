"""On which videos the benchmarks of the input side measure, and where what is made of them is kept."""

import json
import shutil
from pathlib import Path

import pytest

from alpro_stream.errors import AlproError
from benchmarks import corpus, stream
from benchmarks.corpus import Corpus, Video, open_corpus
from benchmarks.harness import Measurement

EXAMPLES = Path(__file__).resolve().parents[2] / corpus.EXAMPLES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """One that holds a clip in H.264 (v050.mp4), and one in VP9; the current folder is beside it."""
    monkeypatch.chdir(tmp_path)
    videos = tmp_path / "set" / "videos"
    videos.mkdir(parents=True)
    for name in ("v050.mp4", "v020.mkv"):
        shutil.copy(EXAMPLES / name, videos)
    return videos


def test_what_not_all_can_read_is_left_out_and_named(folder, capsys):
    whole = (folder / "v050.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no video")
    (folder / "captions.jsonl").write_text("")

    found = open_corpus(folder)

    assert [(video.name, video.width, video.height) for video in found.videos] == [("v050.mp4", 320, 240)]
    assert found.num_left_out == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["cut.mp4", "notes.txt", "v020.mkv"]
    assert "vp9" in lines[-1]
    assert open_corpus(folder) == found
    assert capsys.readouterr().err == "", "it was looked through before"


def test_no_two_sets_are_kept_in_one_folder(folder):
    home = open_corpus(folder).home
    (folder / "v020.mkv").unlink()
    assert open_corpus(folder).home != home
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    homes = {home, open_corpus(folder).home, open_corpus(other).home}
    assert len(homes) == 3
    assert {path.parent for path in homes} == {Path("runs/bench").resolve()}


def test_the_example_clips_keep_their_folder(folder):
    examples = Path("examples/clips/videos")
    examples.parent.mkdir(parents=True)
    folder.rename(examples)
    assert open_corpus(examples.resolve()).home == Path("runs/bench/corpus").resolve()


def test_a_folder_without_videos_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AlproError, match=r"holds no H\.264 video"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(AlproError, match="is no folder of videos"):
        open_corpus(tmp_path / "missing")


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("manifest.jsonl", {"id": "a", "media": "v050.mp4", "captions": ["a city"]}),
        ("../manifest.jsonl", {"id": "a", "media": "videos/v050.mp4", "captions": ["a city"]}),
        ("../captions.jsonl", {"video_id": "a", "path": "videos/v050.mp4", "captions": ["a city"]}),
    ],
)
def test_captions_are_found_by_the_name_of_the_file(folder, place, row):
    (folder / place).write_text(json.dumps(row) + "\nno json\n")
    assert corpus._captions(folder) == {"v050.mp4": ["a city"]}


def test_content_states_a_size_that_a_clip_has():
    sizes = [(100, 900), (640, 360), (320, 240)]
    videos = tuple(Video(f"{width}", width, height, width / 100) for width, height in sizes)
    assert Corpus(Path(), Path(), videos, 2).content() == {
        "clips": 3,
        "median_size": "100x900",
        "median_duration_s": 3.2,
        "total_s": 10.6,
        "left_out": 2,
    }


def test_shards_of_a_folder_without_captions(folder, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parents[2])
    monkeypatch.setattr(corpus, "_HOME", folder.parent / "home")
    monkeypatch.setattr(corpus, "_MIN_SAMPLES", 2)
    found = open_corpus(folder)
    shards = corpus.make_shards(found)
    described = json.loads((shards / "train" / "dataset.json").read_text())
    assert sum(shard["num_samples"] for shard in described["shards"]) == 2
    assert shards.parent == found.home
    before = (shards / "train" / "dataset.json").stat()
    assert corpus.make_shards(found) == shards
    assert (shards / "train" / "dataset.json").stat() == before


def test_rows_of_some_have_no_limit_that_was_not_measured():
    answer = {"cpu_s_per_clip": 1.0, "bytes_read_per_clip": 1.0, "memory_mb": 1.0}
    found = {name: Measurement((1.0,)) for name in (stream._OURS, "mosaic")}
    rows = list(stream._rows(found, {name: [answer] for name in found}))
    assert [row.name for row in rows] == [stream._OURS, "mosaic", "stream over mosaic"]
    assert [row.limit for row in rows] == [None, None, None]
    assert rows[0].target is None
    assert len(list(stream._rows({"mosaic": found["mosaic"]}, {"mosaic": [answer]}))) == 1
