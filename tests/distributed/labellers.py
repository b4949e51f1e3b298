"""Labellers for the prompter process, real and faulty; importable there by name."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from alpro_stream.errors import CheckpointError
from alpro_stream.losses.objective import SoftLabels
from alpro_stream.losses.pem import PemConfig
from alpro_stream.model.alpro import DualEncoder, ModelConfig
from alpro_stream.prompter.client import PrompterClient, PrompterConfig
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stream.batch import Batch
from alpro_stream.testing.configs import TINY_MODEL

ENTITIES, SIZE = 5, 4
SHAPE = (SIZE, 2, 48, 48, 3)


def real_labeller(device="cpu", **options):
    torch.manual_seed(0)
    encoder = DualEncoder(ModelConfig.model_validate(TINY_MODEL), 30)
    banks = {kind: 0.1 * torch.randn(ENTITIES, 16) for kind in ("video", "image")}
    return Labeller(encoder.to(device), banks, PemConfig(threshold=0.57), patch_size=16, **options)


def failing_labeller():
    raise FileNotFoundError("no weights here")


def damaged_labeller():
    raise CheckpointError("model.safetensors: a truncated one")


@dataclass
class Stuck:
    """Says in a file that it was asked, and never answers."""

    asked: Path
    device = torch.device("cpu")

    def __call__(self, *_):
        self.asked.touch()
        time.sleep(600)


def starting_for_ever(started):
    """Says in a file that it was called, and never returns."""
    started.touch()
    time.sleep(600)


@dataclass
class Leaking:
    """Answers, and keeps the batches that it saw."""

    device = torch.device("cpu")

    def __post_init__(self):
        self.kept = []

    def __call__(self, frames, boxes, kind):
        self.kept.append(frames.clone())
        return SoftLabels(torch.ones(len(frames), ENTITIES), torch.ones(len(frames), dtype=torch.bool))


@dataclass
class Refusing:
    """Raises where a batch is black, else answers."""

    device = torch.device("cpu")

    def __call__(self, frames, boxes, kind):
        if not frames.any():
            raise ValueError("a black batch")
        return SoftLabels(torch.ones(len(frames), ENTITIES), torch.ones(len(frames), dtype=torch.bool))


def make_batch(step, size=SIZE, black=False, kind="video"):
    generator = torch.Generator().manual_seed(step)
    texts = torch.zeros(size, 3, dtype=torch.int64)
    num_frames = 1 if kind == "image" else SHAPE[1]
    shape = (size, num_frames, *SHAPE[2:])
    return Batch(
        step=step,
        source=kind,
        kind=kind,
        first_lane=0,
        num_lanes=1,
        keys=("k",) * size,
        captions=("c",) * size,
        frames_BTHWC=torch.randint(0, 1 if black else 256, shape, dtype=torch.uint8, generator=generator),
        ids_BL=texts,
        mask_BL=texts,
        mlm_ids_BL=texts,
        mlm_labels_BL=texts,
        boxes_B4=torch.tensor([[0, 0, 2, 2], [1, 1, 2, 2], [0, 1, 3, 1], [2, 0, 1, 2]])[:size],
        video_id_B=torch.arange(size),
        text_id_B=torch.arange(size),
        noise_B2N=torch.ones(size, 2, size),
        valid_B=torch.ones(size, dtype=torch.bool),
        answers=("",) * size,
        num_quarantined=0,
    )


def start_client(make_labeller, log, rank=3, device=torch.device("cpu"), **config):  # noqa: B008
    config = PrompterConfig(checkpoint=Path("unused"), **{"deadline_s": 120, **config})
    return PrompterClient(make_labeller, SHAPE, ENTITIES, config, log, rank, device)


def train_with_prompter(pipe, log, asked):
    """A trainer that asks for labels that never come, with memory as CUDA IPC names it."""
    Path(f"/dev/shm/torch_{os.getpid()}_1_0").touch()
    client = start_client(asked, log)
    client.submit(make_batch(1))
    pipe.send(client.pid)
    time.sleep(600)
