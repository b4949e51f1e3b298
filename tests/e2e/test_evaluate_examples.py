"""Retrieval over the example clips with their own captions: every mode, in seconds."""

import json
from pathlib import Path

import pytest
from retrieval_files import evaluation, write_checkpoint

from alpro_stream.evaluate.retrieval import evaluate
from alpro_stream.media import FrameConfig, encode_jpeg, open_media, sparse_frames
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample, SampleMetadata
from alpro_stream.shards.writer import ShardWriter

EXAMPLES = Path("examples/clips")
ROWS = [json.loads(line) for line in (EXAMPLES / "manifest.jsonl").read_text().splitlines()]
VIDEOS = [row for row in ROWS if row["kind"] == "video"]
NUM_CAPTIONS = sum(len(row["captions"]) for row in VIDEOS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The videos as a split, with a few small frames of each."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "split").mkdir()
    options = FrameConfig(size=64, fps=1, max_frames=8)
    with ShardWriter(folder / "split", "video-000000", "video") as writer:
        for row in VIDEOS:
            with open_media(EXAMPLES / row["media"]) as file:
                found = sparse_frames(file, options)
            about = SampleMetadata(
                key=row["id"],
                id=row["id"],
                captions=tuple(row["captions"]),
                qa=(),
                kind="video",
                frame_timestamps_s=found.timestamps_s,
                source={"media": row["media"]},
            )
            writer.add(Sample(about, tuple(encode_jpeg(frame, 90) for frame in found.frames)))
        info = writer.close()
    made = DatasetInfo.of_shards("split", {"payload": "frames", "frames": {"size": 64}}, [info])
    save_dataset_info(folder / "split", made)
    write_checkpoint(folder / "model")
    return folder


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
