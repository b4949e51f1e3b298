"""Stored clips to pixels, one by one or many at once: a clip that cannot be decoded costs itself and no other.

What may hang or crash a decoder goes through processes that can be killed (`alpro_stream.stream.isolated`): all stored
videos, and stored frames of a kind not met before. Frames of one data set share a handful of headers, and where the
header is known and the end is there, a JPEG decoder gives pixels whatever lies between.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpro_stream.errors import SampleError
from alpro_stream.shards.sample import is_video
from alpro_stream.stream.decode import DecodeConfig, FrameDecoder, FrameRequest, build_decoder
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.isolated import ClipRequest, IsolatedDecoder, IsolatedError
from alpro_stream.stream.jpeg import grey_jpeg, jpeg_header
from alpro_stream.stream.seeds import Draws
from alpro_stream.stream.sources import Source

_MAX_KNOWN_HEADERS = 1000


@dataclass(frozen=True, slots=True)
class FramesClip:
    """Stored frames of a clip; `positions` says which request each frame of the clip shows."""

    requests: tuple[FrameRequest, ...]
    positions: NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Size of what is stored."""
        return sum(len(request.jpeg) for request in self.requests)


@dataclass(frozen=True, slots=True)
class VideoClip:
    """A stored video, whole, and what is wanted of it."""

    data: bytes
    request: ClipRequest

    @property
    def num_bytes(self) -> int:
        """Size of what is stored."""
        return len(self.data)


def read_clip(source: Source, shard: str, slot: int, place: str, request: ClipRequest) -> FramesClip | VideoClip:
    """What is stored of a sample, as far as the request needs it; of an image one frame, whatever the model's number.

    Raises:
        SampleError: there is nothing, or it cannot be read.
        ShardError: the shard cannot be read.
    """
    members = source.reader.media_members(shard, slot)
    if not members:
        raise SampleError(place, "empty", f"no stored frame and no video; expected at least one {source.kind}")
    if is_video(members[0].extension):
        (data,) = source.reader.read(shard, slot, members[:1])
        return VideoClip(data, request)
    # One frame of an image serves for all: it is repeated as a view, by the encoder.
    num_frames = 1 if source.kind == "image" else request.num_frames
    chosen = choose_frames(len(members), num_frames, request.policy, Draws("frames", *request.identity))
    # A frame that is taken several times (of a short clip) is read and decoded once.
    distinct, positions = np.unique(chosen, return_inverse=True)
    jpegs = source.reader.read(shard, slot, [members[index] for index in distinct])
    return FramesClip(tuple(FrameRequest(jpeg, request.window, request.flip) for jpeg in jpegs), positions)


class ClipDecoder:
    """Decodes clips; used by one thread at a time.

    Args:
        frames: decodes stored frames in this process.
        isolated: decodes and checks in others.
    """

    def __init__(self, frames: FrameDecoder, isolated: IsolatedDecoder) -> None:
        self._frames = frames
        self._isolated = isolated
        self._known_headers: set[bytes] = set()

    def decode(self, clips: Sequence[FramesClip | VideoClip]) -> list[Tensor | IsolatedError]:
        """Pixels of each clip, (T, image_size, image_size, 3) uint8 RGB, or why there are none."""
        found: list[Tensor | IsolatedError | None] = [None] * len(clips)
        videos = {row: (clip.data, clip.request) for row, clip in enumerate(clips) if isinstance(clip, VideoClip)}
        frames = {row: clip for row, clip in enumerate(clips) if isinstance(clip, FramesClip)}
        for row, video in zip(videos, self._isolated.decode_videos(list(videos.values())), strict=True):
            found[row] = video
        headers = {row: {jpeg_header(request.jpeg) for request in clip.requests} for row, clip in frames.items()}
        while rows := self._to_check({row: headers[row] for row in frames if found[row] is None}):
            checks = self._isolated.check_jpegs([[_on_trial(one.jpeg) for one in frames[row].requests] for row in rows])
            for row, error in zip(rows, checks, strict=True):
                found[row] = error or self._decode_unknown(frames[row])
                if not isinstance(found[row], IsolatedError):
                    self._remember(headers[row])
        known = [row for row in frames if found[row] is None]
        for row, pixels in zip(known, self._decode_known([frames[row] for row in known]), strict=True):
            found[row] = pixels
        return [one for one in found if one is not None]

    def close(self) -> None:
        """Ends the processes."""
        self._isolated.close()

    def _to_check(self, headers: Mapping[int, set[bytes | None]]) -> list[int]:
        """Rows with headers that are not known; of those that share them only the first, which may make them known."""
        rows, claimed = [], set(self._known_headers)
        for row, own in headers.items():
            if not own <= claimed:
                rows.append(row)
                claimed.update(header for header in own if header is not None)
        return rows

    def _decode_unknown(self, clip: FramesClip) -> Tensor | IsolatedError:
        """Frame by frame: when one of several cannot be decoded, DALI (2.4) may crash while it works on the others."""
        try:
            pixels = torch.cat([self._frames.decode([request]) for request in clip.requests])
        except ValueError as error:
            return IsolatedError("decode", str(error))
        return pixels[torch.from_numpy(clip.positions).to(pixels.device)]

    def _remember(self, headers: Iterable[bytes | None]) -> None:
        if len(self._known_headers) >= _MAX_KNOWN_HEADERS:
            self._known_headers.clear()  # each frame has its own: nothing is gained by keeping more
        self._known_headers.update(header for header in headers if header is not None)

    def _decode_known(self, clips: Sequence[FramesClip]) -> list[Tensor | IsolatedError]:
        if not clips:
            return []
        try:
            pixels = self._frames.decode([request for clip in clips for request in clip.requests])
        except ValueError as error:
            # A decoder refuses a batch as a whole: one by one it is seen which it was.
            if len(clips) == 1:
                return [IsolatedError("decode", str(error))]
            return [one for clip in clips for one in self._decode_known([clip])]
        parts = torch.split(pixels, [len(clip.requests) for clip in clips])
        return [part[torch.from_numpy(clip.positions).to(part.device)] for part, clip in zip(parts, clips, strict=True)]


def _on_trial(jpeg: bytes) -> bytes:
    """What is decoded to see whether a frame may be: no more than its header where that tells.

    Damage behind a header is no matter once the header is known, so it must be none before that either: what becomes of
    a sample would depend on those that were met before it, and be another thing after a restart.
    """
    header = jpeg_header(jpeg)
    return jpeg if header is None else grey_jpeg(header)


def build_clip_decoder(config: DecodeConfig, image_size: int, max_frames: int, device_id: int | None) -> ClipDecoder:
    """The decoder of a run or an evaluation; see `build_decoder`.

    Args:
        config: where to decode.
        image_size: side of the pixels handed out.
        max_frames: most frames of one call.
        device_id: the GPU, or None on a CPU.
    """
    frames = build_decoder(config, image_size, max_frames, device_id)
    return ClipDecoder(frames, IsolatedDecoder(config.num_processes, config.deadline_s, config.memory_mb))
