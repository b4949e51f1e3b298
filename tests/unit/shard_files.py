"""Small real shards for tests."""

import numpy as np

from alpro_stream.manifest import QA
from alpro_stream.media import encode_jpeg
from alpro_stream.shards import DatasetInfo, Sample, SampleMetadata, ShardWriter, save_dataset_info


def make_sample(key, num_frames=3, kind="video", captions=("a dog runs", "ein Hund läuft")):
    frames = tuple(encode_jpeg(np.full((16, 16, 3), 10 * i, np.uint8), 90) for i in range(num_frames))
    source = {"media": f"{key}.mp4", "width": 64, "height": 48, "codec": "h264", "duration_s": 1.0, "num_frames": 30}
    metadata = SampleMetadata(
        key=key,
        id=f"id of {key}",
        captions=captions,
        qa=(QA("what runs", "a dog"),),
        kind=kind,
        frame_timestamps_s=tuple(i / 3 for i in range(num_frames)),
        source={**source, "start_s": None, "end_s": None},
    )
    return Sample(metadata, frames)


def write_shard(directory, name="video-000000", samples=None, kind="video"):
    directory.mkdir(parents=True, exist_ok=True)
    with ShardWriter(directory, name, kind) as writer:
        for sample in samples or [make_sample("a", 3), make_sample("b", 1), make_sample("c", 12)]:
            writer.add(sample)
        return writer.close()


def write_dataset(directory, **shards):
    infos = [write_shard(directory, name.replace("_", "-"), samples) for name, samples in shards.items()]
    info = DatasetInfo.of_shards(directory.name, {"fps": 3.0}, infos or [write_shard(directory)])
    save_dataset_info(directory, info)
    return info
