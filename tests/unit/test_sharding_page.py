"""The page and the card of real shards."""

import base64
import io
from collections import Counter

import pytest
from media_files import constant_rate, write_video
from page_files import Page
from PIL import Image
from shard_files import make_sample, write_shard

from alpro_sharding import ShardConfig
from alpro_sharding.describe import Account
from alpro_sharding.page import write_pages
from alpro_sharding.results import Work
from alpro_stream.config import validate
from alpro_stream.shards import DatasetInfo, Sample, SampleMetadata, VideoFile


def stored_video(key: str, data: bytes) -> Sample:
    source = {"width": 640, "height": 480, "codec": "av1", "duration_s": 12.0}
    metadata = SampleMetadata(key, key, (f"caption of {key}",), (), "video", (), source)
    return Sample(metadata, (), VideoFile("mp4", io.BytesIO(data), len(data)))


def pages(out, samples, payload="video", entities=None, **account):
    """The page and the card of a set with these samples, each in a shard of its own."""
    shards = [
        write_shard(out / "train", f"{sample.metadata.kind}-{number:06d}", [sample], sample.metadata.kind)
        for number, sample in enumerate(samples)
    ]
    info = DatasetInfo.of_shards("train", {}, shards)
    values = {"manifest": "m.jsonl", "out": str(out), "payload": payload, "entities": entities or {}}
    config = validate(ShardConfig, values, "test")
    report = write_pages(config, out, Account([], splits={"train": info}, **account))
    return Page(report.read_text()), (out / "README.md").read_text()


def pictures(page: Page) -> list[Image.Image]:
    sources = [attributes["src"] for attributes in page.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def test_stored_videos_are_shown_and_a_bad_one_is_left_out(tmp_path):
    video = write_video(tmp_path / "a.mp4", constant_rate(60, 10)).read_bytes()
    samples = [stored_video("good", video), stored_video("bad", b"no video"), stored_video("cut", video[:600])]
    page, _ = pages(tmp_path, samples)
    assert {image.size for image in pictures(page)} == {(112, 112)}
    assert 4 <= len(pictures(page)) <= 8
    text = " ".join(page.text)
    assert "stored video, h264 64x48" in text
    assert "caption of good" in text
    assert "caption of bad" not in text
    assert "caption of cut" not in text


def test_images_beside_stored_videos_are_shown(tmp_path):
    video = write_video(tmp_path / "a.mp4", constant_rate(10, 10)).read_bytes()
    page, _ = pages(tmp_path, [make_sample("picture", 1, "image"), stored_video("good", video)])
    text = " ".join(page.text)
    assert "1 frame, h264 64x48" in text
    assert "stored video, h264 64x48" in text


def test_of_stored_frames_at_most_eight_are_shown(tmp_path):
    page, _ = pages(tmp_path, [make_sample("a", 20)], payload="frames")
    assert len(pictures(page)) == 7
    assert "20 frames, h264 64x48" in " ".join(page.text)


@pytest.mark.parametrize(
    ("entities", "num", "first", "missing"),
    [
        ({"tagger": "pattern", "num": 150}, 150, "word000 (1,000)", "word120"),
        ({"file": "words.txt"}, 2, "word199 (801)", "word000"),
    ],
)
def test_the_vocabulary_is_that_of_the_set(tmp_path, monkeypatch, entities, num, first, missing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("red kite\nword199\n")
    nouns = Counter({f"word{number:03d}": 1000 - number for number in range(200)})
    page, card = pages(tmp_path, [make_sample("a")], payload="frames", entities=entities, nouns=nouns)
    text = " ".join(page.text)
    assert f"{num} nouns, counted" in card
    assert f"The most frequent: {first}" in card
    assert first.partition(" ")[0] in text
    assert missing not in text
    assert ("red kite" in text) == ("file" in entities)


def test_lists_of_duplicates_are_named_when_there_are_any(tmp_path):
    page, _ = pages(tmp_path / "a", [make_sample("a")], payload="frames", num_duplicate_media=3)
    assert any("duplicate_media.txt" in text for text in page.text)
    assert any("keys to leave out" in text for text in page.text)
    assert not any("duplicate_captions.txt" in text for text in page.text)
    page, _ = pages(tmp_path / "b", [make_sample("a")], payload="frames")
    assert not any("keys to leave out" in text for text in page.text)


def test_the_seconds_of_a_machine_are_added_up(tmp_path):
    work = [(10, Work("here", 1.5, 0.0, 0.0, 0.0, 0.0)), (20, Work("here", 2.5, 0.0, 0.0, 0.0, 0.0))]
    page, _ = pages(tmp_path, [make_sample("a")], payload="frames", work=work)
    assert any(text.startswith("7.5") for text in page.text)
