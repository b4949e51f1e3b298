"""The clips behind an index: read from the shards that its index.json names."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from alpro_stream.errors import ShardError
from alpro_stream.evaluate.embed import StoredClip, VideoEmbeddings, embed_videos, evenly_spread, pixels_of
from alpro_stream.evaluate.index import Index
from alpro_stream.evaluate.index_files import INDEX_FILE
from alpro_stream.media import encode_jpeg
from alpro_stream.media.playable import encode_webm
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.stream.clips import ClipDecoder, build_clip_decoder
from alpro_stream.stream.sources import closing_storage, open_sources

_MOST_PICTURES = 8
_MOST_FILM_FRAMES = 32
_FILM_FPS = 4.0
_LEAST_GAP_S, _MOST_GAP_S = 0.001, 3600.0
_PICTURE_PIXELS = 256
_PICTURE_QUALITY = 82


class Picture(NamedTuple):
    """A frame of a clip to look at: a JPEG, and when it is shown in the clip, where that is known."""

    jpeg: bytes
    time_s: float | None


def film_times(times: Sequence[float | None]) -> list[float]:
    """When the frames of a film are shown: at their own times, or four a second where these are none to play by."""
    known = [time_s for time_s in times if time_s is not None]
    gaps = [later - earlier for earlier, later in pairwise(known)]
    # They are what a file says; no comparison holds for nan.
    if gaps and all(_LEAST_GAP_S <= gap <= _MOST_GAP_S for gap in gaps):
        return known
    return [number / _FILM_FPS for number in range(len(times))]


class IndexClips:
    """Opens the data sets of an index, and decodes clips by their row; used by one thread.

    Args:
        index: of these clips.

    Raises:
        ShardError: a data set is not there any more, or holds other samples than were embedded.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._config = index.description.config
        self._decoders: dict[tuple[int, int], ClipDecoder] = {}
        self._stack = ExitStack()
        try:
            storage = self._stack.enter_context(
                closing_storage(self._config.sources, self._config.cache, self._config.fetch)
            )
            self._sources = {source.name: source for source in open_sources(self._config.sources, storage=storage)}
            for source in self._sources.values():
                self._stack.callback(source.reader.close)
        except BaseException:
            self.close()
            raise
        found = {name: source.content for name, source in self._sources.items()}
        if found != index.description.data:
            self.close()
            raise ShardError(
                f"the data sets of {index.directory} changed since it was made: their digests are {found}, and in "
                f"{INDEX_FILE} {index.description.data}; embed them again, into another folder"
            )

    def close(self) -> None:
        """Ends processes, and closes the shards."""
        self._stack.close()

    def clip(self, row: int) -> StoredClip:
        """Where a clip lies."""
        known = self._index.row(row)
        return StoredClip(self._sources[known.source], known.shard, known.slot, known.key, known.captions)

    def videos(self, rows: Sequence[int], encoder: DualEncoder, batch_size: int) -> VideoEmbeddings:
        """Encodes clips as they were when they were embedded.

        Raises:
            SampleError, ShardError: one cannot be read.
        """
        size = encoder.config.video
        choice = evenly_spread(size.num_frames, self._config.video)
        decoder = self._decoder(size.image_size, batch_size * size.num_frames)
        return embed_videos(encoder, [self.clip(row) for row in rows], choice, decoder, batch_size)

    def picture_times(self, row: int) -> list[float | None]:
        """When each of the `pictures` is shown; None where that is not stored."""
        return self._times(self.clip(row), _MOST_PICTURES)

    def film(self, row: int) -> bytes:
        """A clip to play: a WebM file of 32 frames at most, shown at `film_times`.

        Returns:
            Nothing for an image, and for a clip of a single frame.

        Raises:
            SampleError, ShardError: the clip cannot be read.
        """
        times = self._times(self.clip(row), _MOST_FILM_FRAMES)
        if len(times) < 2:
            return b""
        return encode_webm(self._frames(row, len(times)).numpy(), film_times(times))

    def pictures(self, row: int) -> tuple[Picture, ...]:
        """Frames of a clip, spread evenly over it.

        Raises:
            SampleError, ShardError: the clip cannot be read.
        """
        times = self.picture_times(row)
        jpegs = [encode_jpeg(frame.numpy(), _PICTURE_QUALITY) for frame in self._frames(row, len(times))]
        return tuple(Picture(jpeg, time_s) for jpeg, time_s in zip(jpegs, times, strict=True))

    def _frames(self, row: int, count: int) -> Tensor:
        """(T, H, W, 3) uint8."""
        decoder = self._decoder(_PICTURE_PIXELS, _MOST_FILM_FRAMES)
        return pixels_of([self.clip(row)], evenly_spread(count, self._config.video), decoder)[0]

    def _decoder(self, image_size: int, max_frames: int) -> ClipDecoder:
        """In this thread and on the CPU: a few clips are wanted at a time."""
        if (image_size, max_frames) not in self._decoders:
            config = self._config.decode.model_copy(update={"num_workers": 0, "device": "cpu", "backend": "auto"})
            decoder = build_clip_decoder(config, image_size, max_frames, None)
            self._decoders[image_size, max_frames] = self._stack.enter_context(closing(decoder))
        return self._decoders[image_size, max_frames]

    def _times(self, clip: StoredClip, most: int) -> list[float | None]:
        reader = clip.source.reader
        if clip.source.kind == "image":
            return [None]
        if clip.source.stores_videos:
            return [None] * most
        stored = reader.metadata(clip.shard, clip.slot).frame_timestamps_s
        num_stored = len(stored) or len(reader.media_members(clip.shard, clip.slot))
        count = min(most, num_stored)
        chosen = evenly_spread(count, self._config.video).among(num_stored)
        return [stored[number] if stored else None for number in chosen]
