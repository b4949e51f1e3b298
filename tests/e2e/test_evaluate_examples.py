"""Retrieval and recognition over the example clips with their own captions: every mode, in seconds."""

import json
from pathlib import Path

import pytest
from retrieval_files import evaluation, write_checkpoint

from alpro_stream.config import validate
from alpro_stream.evaluate.retrieval import evaluate
from alpro_stream.evaluate.zero_shot import RecognitionConfig, recognise
from alpro_stream.media import FrameConfig, encode_jpeg, open_media, sparse_frames
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample, SampleMetadata
from alpro_stream.shards.writer import ShardWriter

EXAMPLES = Path("examples/clips")
ROWS = [json.loads(line) for line in (EXAMPLES / "manifest.jsonl").read_text().splitlines()]
VIDEOS = [row for row in ROWS if row["kind"] == "video"]
CLASSES = ("woman", "man", "toy", "bird", "car", "water", "hand", "table", "camera")
NUM_CAPTIONS = sum(len(row["captions"]) for row in VIDEOS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The videos as a split, with a few small frames of each; and as one with a class in place of the captions."""
    folder = tmp_path_factory.mktemp("examples")
    write_videos(folder / "split", {row["id"]: row["captions"] for row in VIDEOS})
    write_videos(folder / "classes", {row["id"]: [class_in(row["captions"][0])] for row in VIDEOS})
    write_checkpoint(folder / "model")
    return folder


def class_in(caption):
    """What a clip shows, as its first caption has it."""
    words = caption.lower().split()
    return next((word for word in CLASSES if word in words), "something")


def write_videos(folder, captions):
    folder.mkdir()
    options = FrameConfig(size=64, fps=1, max_frames=8)
    with ShardWriter(folder, "video-000000", "video") as writer:
        for row in VIDEOS:
            with open_media(EXAMPLES / row["media"]) as file:
                found = sparse_frames(file, options)
            about = SampleMetadata(
                key=row["id"],
                id=row["id"],
                captions=tuple(captions[row["id"]]),
                qa=(),
                kind="video",
                frame_timestamps_s=found.timestamps_s,
                source={"media": row["media"]},
            )
            writer.add(Sample(about, tuple(encode_jpeg(frame, 90) for frame in found.frames)))
        info = writer.close()
    made = DatasetInfo.of_shards("split", {"payload": "frames", "frames": {"size": 64}}, [info])
    save_dataset_info(folder, made)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "rerank", "top_k": 16},
        {"captions": "joined", "num_tokens": 60},
        {"num_clips": 3, "aggregation": "lse", "dual_softmax": True},
    ],
    ids=["exact", "rerank", "paragraphs", "clips"],
)
def test_the_examples_are_retrieved_by_their_captions(root, tmp_path, changes):
    result = evaluate(evaluation(root, root / "split", out=tmp_path / "out", batch_size=64, **changes))
    num_captions = len(VIDEOS) if changes.get("captions") == "joined" else NUM_CAPTIONS
    assert (result["split"]["num_videos"], result["split"]["num_captions"]) == (len(VIDEOS), num_captions)
    for both in result["metrics"].values():
        assert both["text_to_video"]["num_queries"] == num_captions
        assert both["video_to_text"]["num_queries"] == len(VIDEOS)
        # An untrained model: anything but a perfect one.
        assert 1 < both["text_to_video"]["mean_rank"] <= len(VIDEOS)


@pytest.mark.parametrize("changes", [{}, {"num_clips": 3, "aggregation": "max"}], ids=["one clip", "clips"])
def test_the_examples_are_recognised_by_what_they_show(root, tmp_path, changes):
    values = {
        "task": "recognition",
        "checkpoint": root / "model",
        "sources": [{"path": root / "classes"}],
        "out": tmp_path / "out",
        "decode": {"num_workers": 0},
        **changes,
    }
    result = recognise(validate(RecognitionConfig, values, source="test"))
    split = result["split"]
    assert (split["num_videos"], split["num_classes"], split["num_unlisted_classes"]) == (len(VIDEOS), 10, 0)
    assert result["chance"]["top_1"] == 10
    assert 0 < result["metrics"]["top_1"] <= result["metrics"]["top_5"] < 100
