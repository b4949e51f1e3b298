"""Bytes of stored frames to pixels: the protocol every decoder keeps, and the choice of one.

A decoder is a function of bytes and parameters. It reads no files, shuffles nothing and draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError


class DecodeConfig(Config):
    """Where and with how many threads frames are decoded."""

    device: Literal["cpu", "mixed"] = "cpu"
    """`mixed` decodes on the GPU (nvJPEG) and leaves the pixels there."""
    num_threads: int = Field(default=2, ge=0)
    """DALI's own threads, on each rank. 0 makes every batch when it is asked for, with no thread beside the step."""
    prefetch: int = Field(default=2, ge=1)
    """Batches prepared ahead of the step, on each rank."""
    queue_mb: int = Field(default=1024, ge=1)
    """Most MiB of batches that wait for the step, and of stored bytes that wait to be decoded, on each rank; one of
    each is always let through."""
    num_processes: int = Field(default=2, ge=1)
    """Processes beside each rank for what may hang or crash a decoder: stored videos, and frames of an unknown kind."""
    deadline_s: float = Field(default=30.0, gt=0)
    """Longest time for one sample in such a process; then it is killed, and the sample counts as unusable."""
    memory_mb: int = Field(default=2048, ge=200)
    """Most memory of such a process, in MiB."""


Window = tuple[float, float, float, float]
WHOLE_FRAME: Window = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class FrameRequest:
    """One stored frame and what is wanted of it.

    Attributes:
        jpeg: the stored bytes.
        window: (left, top, width, height) as fractions of the stored frame.
        flip: mirror left and right, after cropping.
    """

    jpeg: bytes
    window: Window
    flip: bool


class FrameDecoder(Protocol):
    """Decodes, crops, resizes to the model's image size and mirrors."""

    def decode(self, requests: Sequence[FrameRequest]) -> torch.Tensor:
        """Pixels of the requested frames, (N, image_size, image_size, 3) uint8, RGB.

        Bytes that were not checked before may crash the process; see `alpro_stream.stream.clips.ClipDecoder`.

        Raises:
            ValueError: some frame cannot be decoded; its position in `requests` is not known.
        """
        ...


def decoder_name(config: DecodeConfig) -> str:
    """Name of the decoder; part of a run's fingerprint, as no two decoders give the same pixels."""
    return f"dali-{config.device}"


def build_decoder(config: DecodeConfig, image_size: int, max_frames: int, device_id: int | None) -> FrameDecoder:
    """The decoder of stored frames.

    Args:
        config: where to decode.
        image_size: side of the pixels handed out.
        max_frames: most frames of one call.
        device_id: the GPU, or None on a CPU.

    Raises:
        ConfigError: DALI is not installed, or there is no GPU for `mixed`.
    """
    if config.device == "mixed" and device_id is None:
        raise ConfigError("stream.decode.device is mixed, but no GPU was found here; set it to cpu")
    # Imported here: DALI takes seconds to load, and sharding, evaluation pages and tests do without it.
    from alpro_stream.stream.dali import DaliDecoder

    return DaliDecoder(config, image_size, max_frames, device_id)
