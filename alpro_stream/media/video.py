"""Whole clips as they are stored in shards: the file as it is, or encoded anew with key frames close together."""

import errno
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from alpro_stream.errors import MediaError, UnreadableError
from alpro_stream.media.container import explain, open_video
from alpro_stream.media.decode import Clip, Shown, shown_frames
from alpro_stream.media.options import VideoConfig
from alpro_stream.media.probe import SourceInfo, displayed_format
from alpro_stream.media.scaler import SCALING, Scaler
from alpro_stream.media.size import displayed_size

MAX_STORED_BYTES = 2 << 30
"""Largest video that is encoded anew; the members of a shard's archive stay well below what readers take."""

_EBML_HEAD_BYTES = 64
# What decoders on GPUs take of H.264. It also bounds the encoder's memory.
_MAX_SIDE = 4096
# Frames that the encoder holds to look ahead, and their pixels together: 40 frames of 480p, two of 4K.
_MOST_LOOKAHEAD, _LOOKAHEAD_PIXELS = 40, 20_000_000


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """A clip to store.

    Attributes:
        file: its bytes, from the beginning; to be closed after reading. A clip stored as it is is the file given.
        extension: ``mp4``, ``webm``, ``mkv`` or ``avi``.
        source: size and codec of the file given, duration and number of frames of the clip (measured).
    """

    file: BinaryIO
    extension: str
    source: SourceInfo


def stored_video(
    file: BinaryIO,
    options: VideoConfig,
    max_pixels: int,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
) -> StoredVideo:
    """A clip as one file, after all of it was decoded.

    Encoded anew it is H.264 in MP4: upright, BT.709, HDR tone-mapped, each frame displayed when it was, no sound, and
    the same bytes every time.

    Args:
        file: open for reading and seekable; a video in a common container.
        options: as it is, or how to encode it.
        max_pixels: most pixels of a frame.
        start_s: start of the clip, counted from the file's first frame; None for the first frame.
        end_s: end of the clip (exclusive); None for the end of the file.

    Raises:
        UnreadableError: no video, frames of more than `max_pixels`, or a container that shards do not store.
        MediaError: no frame, decoding failed part-way, a part of a file that is not encoded anew, or a result of more
            than `MAX_STORED_BYTES`.
    """
    clip = Clip.of(start_s, end_s)
    if not options.reencode and clip != Clip.of(None, None):
        raise MediaError("a part of a video can only be stored encoded anew; set video.reencode=true")
    with open_video(file, max_pixels) as (container, stream):
        frames = _Counted(shown_frames(container, stream, clip))
        if options.reencode:
            stored, extension = _encoded(frames, stream, options), "mp4"
        else:
            extension = _extension(container.format.name, file)
            for _ in frames:
                pass
            stored = file
        width, height, codec = displayed_format(stream, frames.rotation)
    if stored is file:
        file.seek(0)
    source = SourceInfo(width, height, codec, round(float(frames.shown_until), 6), frames.number)
    return StoredVideo(stored, extension, source)


class _Counted:
    """Frames passed on one by one, with what is known of them in the end."""

    def __init__(self, frames: Iterable[Shown]) -> None:
        self._frames = frames
        self.number, self.rotation, self.shown_until = 0, 0, Fraction(0)

    def __iter__(self) -> Any:
        for shown in self._frames:
            self.number += 1
            self.rotation, self.shown_until = shown.frame.rotation, shown.shown_until
            yield shown


def _extension(formats: str, file: BinaryIO) -> str:
    names = formats.split(",")
    if "mp4" in names:
        return "mp4"
    if "matroska" in names:
        position = file.tell()
        file.seek(0)
        is_webm = b"webm" in file.read(_EBML_HEAD_BYTES)  # the document type that the header states
        file.seek(position)
        return "webm" if is_webm else "mkv"
    if "avi" in names:
        return "avi"
    raise UnreadableError(
        f"a video in {names[0]} cannot be stored as it is: expected MP4, MOV, Matroska, WebM or AVI; set "
        "video.reencode=true"
    )


def _encoded(frames: Iterable[Shown], stream: Any, options: VideoConfig) -> BinaryIO:
    """The frames as an open MP4 file without a name."""
    with tempfile.TemporaryDirectory() as folder:
        # A file with a name, because the muxer opens it again to put its index first.
        path = Path(folder, "clip.mp4")
        try:
            with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
                encoder = _Encoder(container, stream, options)
                for shown in frames:
                    encoder.add(shown)
                encoder.finish()
        except av.FFmpegError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, f"{explain(error)} in the folder for temporary files") from error
            raise MediaError(f"the video cannot be encoded: {explain(error)}") from error
        return path.open("rb")


class _Encoder:
    """Encodes frames into a container, keeping the time each is displayed."""

    def __init__(self, container: Any, source: Any, options: VideoConfig) -> None:
        self._container = container
        self._time_base = Fraction(source.time_base)
        self._pixel_aspect = source.sample_aspect_ratio
        self._options = options
        self._scaler: Scaler | None = None
        self._stream: Any = None
        self._last_pts = -1
        self._next_key = Fraction(0)
        self._num_bytes = 0

    def add(self, shown: Shown) -> None:
        if self._scaler is None:
            width, height = displayed_size(shown.frame.width, shown.frame.height, self._pixel_aspect)
            size = min(width, height, self._options.short_side or width)
            size = min(size, _MAX_SIDE * min(width, height) // max(width, height))
            self._scaler = Scaler(size, "short_side", self._pixel_aspect)
        frame = av.VideoFrame.from_ndarray(self._scaler.pixels(shown.frame), format="rgb24")
        if self._stream is None:
            # Half the resolution of colour needs even sides.
            self._stream = _add_stream(
                self._container, max(frame.width // 2, 1) * 2, max(frame.height // 2, 1) * 2, self._options
            )
            self._stream.codec_context.time_base = self._time_base
        frame = frame.reformat(
            self._stream.width,
            self._stream.height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALING,
            threads=1,
        )
        frame.time_base = self._time_base
        # A clip need not start at a tick: what is rounded must still be later than the frame before.
        frame.pts = self._last_pts = max(self._ticks(shown.shown_from), self._last_pts + 1)
        frame.duration = max(self._ticks(shown.shown_until) - frame.pts, 1)
        if shown.shown_from >= self._next_key or shown.shown_from <= 0:
            frame.pict_type = PictureType.I
            self._next_key = max(shown.shown_from, Fraction(0)) + Fraction(self._options.keyframe_interval_s)
        else:
            frame.pict_type = PictureType.NONE
        self._write(self._stream.encode(frame))

    def _ticks(self, seconds: Fraction) -> int:
        return math.floor(seconds / self._time_base + Fraction(1, 2))

    def finish(self) -> None:
        if self._stream is not None:
            self._write(self._stream.encode(None))

    def _write(self, packets: Any) -> None:
        for packet in packets:
            self._num_bytes += packet.size
            if self._num_bytes > MAX_STORED_BYTES:
                raise MediaError(
                    f"the encoded video has more than {MAX_STORED_BYTES >> 30} GiB; raise video.crf, lower "
                    "video.short_side or cut the video into clips"
                )
            self._container.mux(packet)


def _add_stream(container: Any, width: int, height: int, options: VideoConfig) -> Any:
    stream = container.add_stream("libx264")
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    context.max_b_frames = 0
    context.gop_size = 1 << 20  # key frames are asked for by time, because frames need not be evenly spaced
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    context.flags |= av.codec.context.Flags.frame_duration
    lookahead = min(_MOST_LOOKAHEAD, _LOOKAHEAD_PIXELS // (width * height))
    stream.options = {"crf": str(options.crf), "forced-idr": "1", "refs": "1", "rc-lookahead": str(lookahead)}
    return stream
