"""Stored clips to pixels, one by one or many at once: a clip that cannot be decoded costs itself and no other.

What may hang or crash a decoder goes through processes that can be killed (`alpro_stream.stream.isolated`): all stored
videos, and frames that are no plain JPEG.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpro_stream.errors import SampleError
from alpro_stream.shards.sample import is_video
from alpro_stream.stream.decode import (
    DecodeConfig,
    FrameDecoder,
    FrameRequest,
    VideoDecoder,
    VideoRequest,
    build_decoder,
    build_video_decoder,
)
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import FrameChoice, IsolatedDecoder, IsolatedError, Pictures
from alpro_stream.stream.jpeg import HeaderReader, JpegHeader, grey_jpeg
from alpro_stream.stream.sources import Source
from alpro_stream.stream.view import View, show

_MAX_KNOWN_HEADERS = 1000


@dataclass(frozen=True, slots=True)
class FramesClip:
    """Stored frames of a clip, each once; `positions` says which of them each frame of the clip shows, ascending."""

    jpegs: tuple[bytes, ...]
    positions: tuple[int, ...]
    view: View

    @property
    def num_bytes(self) -> int:
        """Size of what is stored."""
        return sum(map(len, self.jpegs))


@dataclass(frozen=True, slots=True)
class VideoClip:
    """A stored video, whole, and what is wanted of it."""

    data: bytes
    choice: FrameChoice
    view: View

    @property
    def positions(self) -> Sequence[int]:
        """As of stored frames: here each wanted frame is decoded by itself."""
        return range(self.choice.num_frames)

    @property
    def num_bytes(self) -> int:
        """Size of what is stored."""
        return len(self.data)


def read_clip(
    source: Source, shard: str, slot: int, place: str, choice: FrameChoice, view: View
) -> FramesClip | VideoClip:
    """What is stored of a sample, as far as it is wanted; of an image one frame, whatever the model's number.

    Raises:
        SampleError: there is nothing, or it cannot be read.
        ShardError: the shard cannot be read.
    """
    members = source.reader.media_members(shard, slot)
    if not members:
        raise SampleError(place, "empty", f"no stored frame and no video; expected at least one {source.kind}")
    if is_video(members[0].extension):
        (data,) = source.reader.read(shard, slot, members[:1])
        return VideoClip(data, choice, view)
    chosen = choice.among(len(members))
    # A frame that is taken several times (of a short clip) is read and decoded once.
    distinct = sorted(set(chosen))
    jpegs = source.reader.read(shard, slot, [members[index] for index in distinct])
    return FramesClip(tuple(jpegs), tuple(distinct.index(index) for index in chosen), view)


class ClipDecoder:
    """Decodes clips; used by one thread at a time.

    Args:
        frames: decodes plain stored frames.
        isolated: decodes and tries everything else in others.
        videos: decodes stored videos in this process; None where others do.
        image_size: side of the pixels handed out.
        pin_memory: whether finished pixels on the CPU go where a GPU can fetch them while the step goes on.
        gauges: get the number of clips that `frames` or `videos` left to others.
    """

    def __init__(
        self,
        frames: FrameDecoder,
        isolated: IsolatedDecoder,
        image_size: int,
        pin_memory: bool = False,
        gauges: Gauges | None = None,
        videos: VideoDecoder | None = None,
    ) -> None:
        self._frames = frames
        self._videos = videos
        self._isolated = isolated
        self._image_size = image_size
        self._pin_memory = pin_memory
        self._gauges = gauges or Gauges()
        self._headers = HeaderReader()
        self._tried: set[bytes] = set()

    @property
    def device(self) -> torch.device:
        """Where the pixels are written."""
        return self._frames.device

    def empty(self, num_clips: int, num_frames: int) -> Tensor:
        """Room for pixels: (B, T, image_size, image_size, 3) uint8, where the decoder writes."""
        return self._frames.empty((num_clips, num_frames, self._image_size, self._image_size, 3))

    def finished(self, pixels: Tensor) -> Tensor:
        """The pixels where a step takes them from. PyTorch's own pinned memory: it waits for copies that go on."""
        return pixels.pin_memory() if self._pin_memory else pixels

    def decode(self, clips: Sequence[FramesClip | VideoClip], out_BTHWC: Tensor) -> list[IsolatedError | None]:
        """`start`, and the wait for its end."""
        return self.start(clips, out_BTHWC)()

    def start(
        self, clips: Sequence[FramesClip | VideoClip], out_BTHWC: Tensor
    ) -> Callable[[], list[IsolatedError | None]]:
        """Begins to write the pixels of each clip, RGB; as far as the decoder of frames works beside this thread.

        Args:
            clips: of as many frames as there is room for.
            out_BTHWC: from `empty`, or some clips of that.

        Returns:
            A function that does the rest and waits for the end. It gives for each clip why there are no pixels, None
            where there are.
        """
        frames = {row: clip for row, clip in enumerate(clips) if isinstance(clip, FramesClip)}
        headers = {row: [self._headers.read(jpeg) for jpeg in clip.jpegs] for row, clip in frames.items()}
        plain = {row: [one for one in own if one is not None] for row, own in headers.items() if None not in own}
        refused = self._try(plain) if self._frames.needs_trial else {}
        taken = {row: (frames[row], own) for row, own in plain.items() if row not in refused}
        plain_errors = self._start_plain(taken, out_BTHWC)
        unusual = {row: clip for row, clip in frames.items() if row not in plain}
        videos = {row: clip for row, clip in enumerate(clips) if isinstance(clip, VideoClip)}

        def finish() -> list[IsolatedError | None]:
            errors = refused | self._decode_videos(videos, out_BTHWC) | self._decode_unusual(unusual, out_BTHWC)
            errors |= plain_errors()
            return [errors.get(row) for row in range(len(clips))]

        return finish

    def close(self) -> None:
        """Ends the processes and threads."""
        self._isolated.close()
        self._frames.close()
        if self._videos is not None:
            self._videos.close()

    def _decode_here(
        self, decoder: VideoDecoder, clips: Mapping[int, VideoClip], out_BTHWC: Tensor
    ) -> tuple[dict[int, VideoClip], dict[int, IsolatedError]]:
        """Writes the pixels of those videos that the decoder takes; gives the others, and what is wrong with some."""
        found = self._isolated.locate_videos([(clip.data, clip.choice) for clip in clips.values()])
        located = {row: one for row, one in zip(clips, found, strict=True) if not isinstance(one, IsolatedError)}
        requests = [VideoRequest(clips[row].data, one, clips[row].view) for row, one in located.items()]
        refused = decoder.decode(requests, out_BTHWC, list(located))
        done = {row for number, row in enumerate(located) if number not in refused}
        # Where it cannot be told where the frames are, PyAV may still decode them all; not so what hung or crashed.
        lost = {
            row: one
            for row, one in zip(clips, found, strict=True)
            if isinstance(one, IsolatedError) and one.cause != "decode"
        }
        return {row: clip for row, clip in clips.items() if row not in done and row not in lost}, lost

    def _decode_videos(self, clips: Mapping[int, VideoClip], out_BTHWC: Tensor) -> dict[int, IsolatedError]:
        """In this process those that its decoder takes, the others by PyAV."""
        if not clips:
            return {}
        lost: dict[int, IsolatedError] = {}
        if self._videos is not None:
            clips, lost = self._decode_here(self._videos, clips, out_BTHWC)
        found = self._isolated.decode_videos([(clip.data, clip.choice) for clip in clips.values()])
        errors = _show_found(clips, found, out_BTHWC)
        if self._videos is not None:
            self._gauges.count("fallbacks", len(clips) - len(errors))
        return lost | errors

    def _decode_unusual(self, clips: Mapping[int, FramesClip], out_BTHWC: Tensor) -> dict[int, IsolatedError]:
        """By Pillow, in another process: other formats, progressive files, other colours, turned pictures."""
        if not clips:
            return {}
        found = self._isolated.decode_pictures([clip.jpegs for clip in clips.values()])
        errors = _show_found(clips, found, out_BTHWC)
        self._gauges.count("fallbacks", len(clips) - len(errors))
        return errors

    def _start_plain(
        self, clips: Mapping[int, tuple[FramesClip, Sequence[JpegHeader]]], out_BTHWC: Tensor
    ) -> Callable[[], dict[int, IsolatedError]]:
        num_frames = out_BTHWC.shape[1]
        requests, places = [], []
        for row, (clip, headers) in clips.items():
            for number, (jpeg, header) in enumerate(zip(clip.jpegs, headers, strict=True)):
                requests.append(FrameRequest(jpeg, header.width, header.height, clip.view))
                places.append(row * num_frames + clip.positions.index(number))
        failed_frames = self._frames.start(requests, out_BTHWC.flatten(0, 1), places)

        def finish() -> dict[int, IsolatedError]:
            failed = failed_frames()
            _repeat_frames({row: clip for row, (clip, _) in clips.items()}, out_BTHWC)
            # Of several frames of a clip the first, whichever was found damaged first.
            ordered = sorted(failed.items(), reverse=True)
            return {places[number] // num_frames: IsolatedError(*error) for number, error in ordered}

        return finish

    def _try(self, headers: Mapping[int, Sequence[JpegHeader]]) -> dict[int, IsolatedError]:
        """Clips with a header that no decoder takes, found where a crash costs nothing.

        Of a file no more than the header is tried: damage behind it is no matter once the header is known, so it must
        be none before that either. What becomes of a sample would depend on those that were met before it, and be
        another thing after a restart.
        """
        if len(self._tried) >= _MAX_KNOWN_HEADERS:
            self._tried.clear()  # each frame has its own: nothing is gained by keeping more
        new = {header.data: header for own in headers.values() for header in own if header.data not in self._tried}
        found = self._isolated.try_pictures([(grey_jpeg(header),) for header in new.values()])
        errors = {data: error for data, error in zip(new, found, strict=True) if error is not None}
        self._tried.update(data for data in new if data not in errors)
        return {
            row: next(errors[header.data] for header in own if header.data in errors)
            for row, own in headers.items()
            if any(header.data in errors for header in own)
        }


def _repeat_frames(clips: Mapping[int, FramesClip], out_BTHWC: Tensor) -> None:
    """Copies the frames that clips show more than once."""
    # As an array on a CPU: for a copy as small as this one, torch wakes all of its threads.
    pixels: Any = out_BTHWC.numpy() if out_BTHWC.device.type == "cpu" else out_BTHWC
    for row, clip in clips.items():
        for position, number in enumerate(clip.positions):
            if (first := clip.positions.index(number)) != position:
                pixels[row, position] = pixels[row, first]


def _show_found(
    clips: Mapping[int, FramesClip | VideoClip], found: Sequence[Pictures | IsolatedError], out_BTHWC: Tensor
) -> dict[int, IsolatedError]:
    """Writes the pixels of clips, by their rows, that were decoded elsewhere; gives what is wrong with the others."""
    errors = {}
    for (row, clip), pictures in zip(clips.items(), found, strict=True):
        if isinstance(pictures, IsolatedError):
            errors[row] = pictures
        else:
            _show(pictures, clip.positions, clip.view, out_BTHWC[row])
    return errors


def _show(pictures: Pictures, positions: Iterable[int], view: View, out_THWC: Tensor) -> None:
    """Writes the pixels of a clip from its decoded frames."""
    pixels_THWC = out_THWC if out_THWC.device.type == "cpu" else torch.empty_like(out_THWC, device="cpu")
    for frame_HWC, number in zip(pixels_THWC.numpy(), positions, strict=True):
        show(pictures[number], view, frame_HWC)
    if pixels_THWC is not out_THWC:
        out_THWC.copy_(pixels_THWC)


def build_clip_decoder(
    config: DecodeConfig,
    image_size: int,
    max_frames: int,
    device_id: int | None,
    gauges: Gauges | None = None,
) -> ClipDecoder:
    """The decoder of a run or an evaluation; see `build_decoder`.

    Args:
        config: where to decode.
        image_size: side of the pixels handed out.
        max_frames: most frames of one call.
        device_id: the GPU, or None on a CPU.
        gauges: get what it counts.
    """
    frames = build_decoder(config, image_size, max_frames, device_id)
    isolated = IsolatedDecoder(config.num_processes, config.deadline_s, config.memory_mb)
    videos = build_video_decoder(config, image_size, max_frames, device_id)
    pin_memory = device_id is not None and frames.device.type == "cpu"
    return ClipDecoder(frames, isolated, image_size, pin_memory, gauges, videos)
