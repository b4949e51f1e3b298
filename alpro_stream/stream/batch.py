"""One rank's part of a global batch. Tensors: B samples, T frames, H, W pixels, L tokens, N samples of a lane."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of the rank's lanes, lane by lane.

    Attributes:
        step: position in the run.
        source: name of the source.
        kind: all samples of a batch are videos, or all are images.
        first_lane: number of the first lane in the run.
        num_lanes: lanes of this batch; each has B / num_lanes samples, next to each other.
        keys: sample keys.
        captions: the chosen caption of each sample.
        frames_BTHWC: uint8 RGB; T is 1 for images.
        ids_BL: token ids, int64.
        mask_BL: attention mask, int64, 1 = token.
        mlm_ids_BL: token ids with some hidden.
        mlm_labels_BL: hidden ids, -100 where nothing is predicted.
        boxes_B4: PEM's crop: top, left, height, width in patches, int64.
        video_id_B: equal for the same video.
        text_id_B: equal for the same words.
        noise_B2N: for the race of hard negatives among the samples of a lane, exponential with rate 1: of the videos
            for this text, then of the texts for this video.
        valid_B: False for a sample that could not be read and has no substitute: its pixels are black, its text is
            empty, and no loss may see it.
        answers: the answer to each question where the unit of the pass is `question`, empty strings elsewhere.
        num_quarantined: planned samples that something else stands in for, or that are not valid.
    """

    step: int
    source: str
    kind: Literal["video", "image"]
    first_lane: int
    num_lanes: int
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    frames_BTHWC: Tensor
    ids_BL: Tensor
    mask_BL: Tensor
    mlm_ids_BL: Tensor
    mlm_labels_BL: Tensor
    boxes_B4: Tensor
    video_id_B: Tensor
    text_id_B: Tensor
    noise_B2N: Tensor
    valid_B: Tensor
    answers: tuple[str, ...]
    num_quarantined: int

    def __post_init__(self) -> None:
        size, length = len(self.keys), self.ids_BL.shape[1]
        for name in ("captions", "answers"):
            if len(getattr(self, name)) != size:
                raise ValueError(f"Batch.{name} has {len(getattr(self, name))} entries for {size} keys")
        if size % self.num_lanes:
            raise ValueError(f"{size} samples are not a whole number for each of {self.num_lanes} lanes")
        expected = {
            "ids_BL": (size, length),
            "mask_BL": (size, length),
            "mlm_ids_BL": (size, length),
            "mlm_labels_BL": (size, length),
            "boxes_B4": (size, 4),
            "video_id_B": (size,),
            "text_id_B": (size,),
            "noise_B2N": (size, 2, size // self.num_lanes),
            "valid_B": (size,),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"Batch.{name} has shape {found}, expected {shape}")
        if self.frames_BTHWC.ndim != 5 or self.frames_BTHWC.shape[0] != size or self.frames_BTHWC.shape[-1] != 3:
            raise ValueError(f"Batch.frames_BTHWC has shape {tuple(self.frames_BTHWC.shape)}, expected (B, T, H, W, 3)")
        for name, dtype in {"frames_BTHWC": torch.uint8, "valid_B": torch.bool}.items():
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"Batch.{name} is {getattr(self, name).dtype}, expected {dtype}")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(value.nbytes for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies overlap with what runs there."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def micro_batches(self, count: int) -> list["Batch"]:
        """Cuts the batch between lanes into `count` equal parts; a lane is never split.

        The first part has the whole `num_quarantined`, so that the parts add up.

        Raises:
            ValueError: `count` does not divide the lanes.
        """
        if self.num_lanes % count:
            raise ValueError(f"{self.num_lanes} lanes cannot be cut into {count} equal micro-batches")
        return [self._part(i, count) for i in range(count)]

    def _part(self, part: int, count: int) -> "Batch":
        size, num_lanes = len(self) // count, self.num_lanes // count
        rows = slice(part * size, (part + 1) * size)
        cut: dict[str, Any] = {
            field.name: value[rows]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | tuple)
        }
        cut["num_quarantined"] = 0 if part else self.num_quarantined
        return replace(self, first_lane=self.first_lane + part * num_lanes, num_lanes=num_lanes, **cut)
