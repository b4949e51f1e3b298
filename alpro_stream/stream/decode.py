"""Bytes of stored frames to pixels: what every decoder is, and the choice of one.

A decoder is a function of bytes and parameters. It reads no files, shuffles nothing and draws nothing.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator

from alpro_stream.config import Config
from alpro_stream.errors import Cause, ConfigError
from alpro_stream.stream.nvdec import LocatedVideo
from alpro_stream.stream.view import View

Backend = Literal["libjpeg-turbo", "dali"]
_MOST_STORED_SIDE = 512


class DecodeConfig(Config):
    """Where and with how many threads frames are decoded."""

    device: Literal["cpu", "mixed"] = "cpu"
    """`mixed` decodes on the GPU (nvJPEG, NVDEC) and leaves the pixels there."""
    backend: Literal["auto", "libjpeg-turbo", "dali"] = "auto"
    """What decodes stored frames. `auto` is DALI on a GPU and libjpeg-turbo on a CPU, where it is the faster one
    (`benchmarks/decode.py`) and DALI need not be installed."""
    workers: Literal["processes", "threads"] = "processes"
    """What libjpeg-turbo works in. Processes are the faster ones in a stream, as Python runs one thread at a time
    (`benchmarks/stream.py`); they need Linux, elsewhere threads are used. DALI always has threads of its own."""
    num_workers: int = Field(default=2, ge=0)
    """Workers on each rank. 0 makes every batch when it is asked for, with no thread or process beside the step."""
    prefetch: int = Field(default=2, ge=1)
    """Batches prepared ahead of the step, on each rank; one more is read and being decoded."""
    queue_mb: int = Field(default=1024, ge=1)
    """Most MiB of batches that wait for the step, on each rank; one is always let through."""
    num_processes: int = Field(default=2, ge=1)
    """Processes beside each rank for what may hang or crash a decoder: stored videos, and frames of an unknown kind."""
    deadline_s: float = Field(default=30.0, gt=0, le=86_400)
    """Longest time for one sample in such a process, or for a worker's share of a batch; then it is killed. What comes
    to that twice, of a share each frame by itself, is unusable."""
    memory_mb: int = Field(default=2048, ge=200)
    """Most memory of such a process, in MiB."""
    device_memory_mb: int = Field(default=6144, ge=256)
    """Most memory of a GPU that decoding takes beside CUDA's own, in MiB: for buffers, and what they leave for NVDEC,
    which keeps frames for each size of video. Computed for stored frames of up to 512 pixels; larger ones take more."""

    @model_validator(mode="after")
    def _can_use_a_gpu(self) -> Self:
        if self.device == "mixed" and self.backend == "libjpeg-turbo":
            raise ValueError("stream.decode.backend=libjpeg-turbo works on a CPU only; set device=cpu or backend=dali")
        return self

    @property
    def uses_processes(self) -> bool:
        """Whether stored frames are decoded in other processes."""
        wanted = self.workers == "processes" and self.num_workers > 0 and self.chosen_backend == "libjpeg-turbo"
        return wanted and sys.platform == "linux"

    @property
    def chosen_backend(self) -> Backend:
        """The backend, whether it was named or not."""
        if self.backend == "auto":
            return "dali" if self.device == "mixed" else "libjpeg-turbo"
        return self.backend


@dataclass(frozen=True, slots=True)
class FrameRequest:
    """One stored frame and what is wanted of it.

    Attributes:
        jpeg: the stored bytes, a plain JPEG (`alpro_stream.stream.jpeg.read_header`).
        width: of the stored frame, in pixels.
        height: of the stored frame, in pixels.
        view: what is seen of it.
    """

    jpeg: bytes
    width: int
    height: int
    view: View


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """A stored video and what is wanted of it.

    Attributes:
        data: the file.
        located: the wanted frames, and their size as a data set would hold them.
        view: what is seen of them.
    """

    data: bytes
    located: LocatedVideo
    view: View


class FrameError(NamedTuple):
    """Why a frame has no pixels.

    Attributes:
        cause: ``decode`` (refused), ``deadline`` or ``crash`` (of a process that decodes it).
        reason: what was found, in a sentence.
    """

    cause: Cause
    reason: str


class FrameDecoder(ABC):
    """Decodes stored frames and shows what their views ask for.

    Attributes:
        device: where the pixels are written.
        needs_trial: whether damaged bytes may crash the process: headers it has not met before must then be tried
            elsewhere.
    """

    device: torch.device
    needs_trial: bool

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Room for pixels where it can write them, with anything in it."""
        return torch.empty(*shape, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def start(
        self, requests: Sequence[FrameRequest], out_NHWC: torch.Tensor, rows: Sequence[int]
    ) -> Callable[[], dict[int, FrameError]]:
        """Begins to write the pixels of request ``i`` to ``out_NHWC[rows[i]]``.

        Other calls may be begun before this one is waited for.

        Args:
            requests: plain JPEGs.
            out_NHWC: uint8 RGB of `empty`, contiguous, of the model's image size.
            rows: a row for each request, ascending.

        Returns:
            A function that waits for the end. It gives what is wrong with the requests that cannot be decoded, by
            number; the others are there then.
        """

    def decode(
        self, requests: Sequence[FrameRequest], out_NHWC: torch.Tensor, rows: Sequence[int]
    ) -> dict[int, FrameError]:
        """`start`, and the wait for its end."""
        return self.start(requests, out_NHWC, rows)()

    @abstractmethod
    def close(self) -> None:
        """Ends its threads and processes."""


class VideoDecoder(Protocol):
    """Decodes stored videos in this process, and shows what their views ask for."""

    def decode(self, requests: Sequence[VideoRequest], out_BTHWC: torch.Tensor, rows: Sequence[int]) -> dict[int, str]:
        """Writes the frames of request ``i`` to ``out_BTHWC[rows[i]]``.

        Args:
            requests: of as many frames as there is room for.
            out_BTHWC: uint8 RGB, contiguous, of the model's image size.
            rows: a row for each request, ascending.

        Returns:
            Why requests are not decoded, by number. Another decoder may take them.
        """
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


def decoder_name(config: DecodeConfig) -> str:
    """Name of the decoder; part of a run's fingerprint, as no two decoders give the same pixels."""
    return f"{config.chosen_backend}-{config.device}"


def build_video_decoder(
    config: DecodeConfig, image_size: int, max_frames: int, device_id: int | None
) -> VideoDecoder | None:
    """NVDEC, where frames are decoded on a GPU; None where it is not used. Arguments as of `build_decoder`.

    Raises:
        ConfigError: `device_memory_mb` is too little for the buffers of frames alone.
    """
    if config.device == "cpu":
        return None
    from alpro_stream.stream.dali import DaliVideoDecoder, device_memory_mb

    frames_mb = device_memory_mb(image_size, max_frames, _MOST_STORED_SIDE**2, config.num_workers)
    if frames_mb > config.device_memory_mb:
        raise ConfigError(
            f"decoding may take {frames_mb} MiB of the GPU for {max_frames} frames of {image_size} pixels; "
            f"stream.decode.device_memory_mb allows {config.device_memory_mb}: raise it, or give a rank smaller batches"
        )
    return DaliVideoDecoder(config, image_size, device_id, config.device_memory_mb - frames_mb)


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
    if config.chosen_backend == "libjpeg-turbo":
        if config.uses_processes:
            from alpro_stream.stream.workers import TurboWorkers

            return TurboWorkers(config.num_workers, config.deadline_s)
        from alpro_stream.stream.turbo import TurboDecoder

        return TurboDecoder(config.num_workers)
    # Imported here: DALI takes seconds to load, and most of what decodes on a CPU does without it.
    from alpro_stream.stream.dali import DaliDecoder

    return DaliDecoder(config, image_size, max_frames, device_id)
