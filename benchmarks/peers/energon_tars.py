"""JPEG frames in tars through Megatron-Energon: crude samples, of which a task encoder decodes the chosen frames."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from clips import choose_frames, clip, turbo
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from options import Options

SHUFFLE_BUFFER = 100
"""Samples a worker holds as bytes."""


def prepare(folder: Path, tars: list[Path]) -> None:
    """Links the tars into the folder and has Energon index them."""
    folder.mkdir()
    for tar in tars:
        (folder / tar.name).symlink_to(tar.resolve())
    energon = Path(sys.executable).with_name("energon")
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([energon, "prepare", *options, folder], check=True, stdin=subprocess.DEVNULL)


@edataclass
class Clip(Sample):
    """A clip's pixels, (frames, crop, crop, 3)."""

    pixels: torch.Tensor


class Clips(DefaultTaskEncoder):
    """Chooses and decodes frames, and makes batches."""

    decoder = None  # without this, Energon decodes all frames of each sample

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.cookers = [Cooker(self.cook)]

    @stateless(restore_seeds=True)
    def cook(self, sample: dict) -> Clip:
        """Chooses and decodes the frames of a sample, whose members come as bytes."""
        names = sorted(name for name in sample if name.endswith(".jpg"))
        chosen = choose_frames(len(names), self.options.frames)
        pixels = clip([sample[names[i]] for i in chosen], self.options.crop, turbo)
        return Clip(**basic_sample_keys(sample), pixels=pixels)

    def batch(self, samples: list[Clip]) -> torch.Tensor:
        """A batch, (clips, frames, crop, crop, 3)."""
        return torch.stack([sample.pixels for sample in samples])


def batches(options: Options) -> Iterator[torch.Tensor]:
    dataset = get_train_dataset(
        options.data / "energon",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=options.workers),
        batch_size=options.batch,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Clips(options),
    )
    # Between two samples of a benchmark nothing comes for minutes: not what the watchdog should report.
    yield from get_savable_loader(dataset, watchdog_timeout_seconds=None)
