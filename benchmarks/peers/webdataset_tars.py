"""JPEG frames in tars through `webdataset`: every member is read, only the chosen frames are decoded."""

from collections.abc import Iterator

import torch
import webdataset
from clips import Decode, choose_frames, clip
from options import Options

SHUFFLE_BUFFER = 100
"""Samples a worker holds as bytes."""


def batches(options: Options, decode: Decode) -> Iterator[torch.Tensor]:
    def make_clip(sample: dict[str, bytes]) -> tuple[torch.Tensor]:
        names = sorted(name for name in sample if name.endswith(".jpg"))
        chosen = choose_frames(len(names), options.frames)
        return (clip([sample[names[i]] for i in chosen], options.crop, decode),)

    # Each worker draws shards with replacement and never comes to an end: what its documentation advises for training.
    urls = [str(path) for path in sorted((options.data / "shards" / "train").glob("video-*.tar"))]
    samples = webdataset.WebDataset(urls, resampled=True).shuffle(SHUFFLE_BUFFER).map(make_clip).batched(options.batch)
    for (clips,) in webdataset.WebLoader(samples, batch_size=None, num_workers=options.workers):
        yield clips
