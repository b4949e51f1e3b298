"""JPEG frames in Mosaic Streaming's shards (MDS): one sample a clip, read by random access."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clips import choose_frames, clip, turbo
from options import Options
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

COLUMNS = {"key": "str", "jpegs": "bytes", "ends": "ndarray:int64"}


def write(folder: Path, samples: Iterable[tuple[str, list[bytes]]]) -> None:
    """Writes clips (key, JPEG frames); a sample's frames lie one after the other, `ends` tells where each stops."""
    with MDSWriter(out=str(folder), columns=COLUMNS) as writer:
        for key, jpegs in samples:
            ends = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=np.int64)
            writer.write({"key": key, "jpegs": b"".join(jpegs), "ends": ends})


class Clips(StreamingDataset):
    """The clips of an MDS folder."""

    def __init__(self, options: Options) -> None:
        super().__init__(
            local=str(options.data / "mds"), shuffle=True, batch_size=options.batch, epoch_size=options.clips
        )
        self.options = options

    def __getitem__(self, at: int) -> torch.Tensor:
        """A clip, (frames, crop, crop, 3)."""
        sample: dict[str, Any] = super().__getitem__(at)
        ends = [0, *sample["ends"].tolist()]
        chosen = choose_frames(len(ends) - 1, self.options.frames)
        jpegs = [sample["jpegs"][ends[i] : ends[i + 1]] for i in chosen]
        return clip(jpegs, self.options.crop, turbo)


def batches(options: Options) -> Iterator[torch.Tensor]:
    # What a killed run left in shared memory would be refused as a second user of the folder.
    clean_stale_shared_memory()
    loader = StreamingDataLoader(
        Clips(options),
        batch_size=options.batch,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    while True:
        yield from loader
