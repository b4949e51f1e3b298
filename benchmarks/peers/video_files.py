"""Frames out of video files by random access: decord, as the ALPRO authors do it, and torchcodec."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from clips import choose_crop, choose_frames
from options import RESIZED, Options
from torch.utils.data import DataLoader, Dataset

Read = Callable[[Path, Options], torch.Tensor]


def read_decord(path: Path, options: Options) -> torch.Tensor:
    """The authors' way: decord resizes, the whole frames are cropped afterwards. (frames, crop, crop, 3)."""
    import decord  # noqa: TID251

    decord.bridge.set_bridge("torch")
    video = decord.VideoReader(str(path), width=RESIZED, height=RESIZED)
    frames = video.get_batch(choose_frames(len(video), options.frames))
    top, left = choose_crop(RESIZED, RESIZED, options.crop)
    return frames[:, top : top + options.crop, left : left + options.crop].contiguous()


def read_torchcodec(path: Path, options: Options) -> torch.Tensor:
    """Frames in file size, then torchvision's resize; measured faster than `VideoDecoder(transforms=...)`.

    (frames, 3, crop, crop).
    """
    from torchcodec.decoders import VideoDecoder
    from torchvision.transforms.v2 import functional

    video = VideoDecoder(path)
    frames = functional.resize(video.get_frames_at(choose_frames(len(video), options.frames)).data, [RESIZED, RESIZED])
    top, left = choose_crop(RESIZED, RESIZED, options.crop)
    return frames[:, :, top : top + options.crop, left : left + options.crop].contiguous()


class VideoFiles(Dataset):
    """The clips of a folder, repeated to the length of the epoch."""

    def __init__(self, folder: Path, options: Options, read: Read) -> None:
        self.paths = sorted(folder.iterdir())
        self.options = options
        self.read = read

    def __len__(self) -> int:
        """Clips of an epoch."""
        return self.options.clips

    def __getitem__(self, index: int) -> torch.Tensor:
        """A clip."""
        return self.read(self.paths[index % len(self.paths)], self.options)


def batches(options: Options, folder: str, read: Read) -> Iterator[torch.Tensor]:
    loader = DataLoader(
        VideoFiles(options.data / folder, options, read),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    while True:
        yield from loader
