"""A sample as it lies in a shard: ``<key>.json``, ``<key>.txt``, ``<key>.000.jpg`` and on, in this order.

Or, with the payload `video`, ``<key>.mp4`` (``webm``, ``mkv``, ``avi``) in place of the frames.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from pydantic_core import from_json

from alpro_stream.manifest import KINDS, QA, VIDEO_SUFFIXES, Kind

METADATA_EXTENSION = "json"
CAPTION_EXTENSION = "txt"
# Three digits keep the members in order by name too.
MAX_FRAMES = 1000
TAR_BLOCK_BYTES = 512
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi")


@dataclass(frozen=True, slots=True)
class SampleMetadata:
    """What ``<key>.json`` holds.

    Attributes:
        key: name of the sample in the shard, made from the id; not in the JSON itself.
        id: the user's name for the clip.
        captions: all captions, at least one.
        qa: question-answer pairs.
        kind: video or image.
        frame_timestamps_s: when each stored frame is displayed, in seconds after the source's first frame.
        source: ``media``, ``width``, ``height``, ``codec``, ``duration_s`` and ``num_frames`` of the clip in its
            source, ``start_s`` and ``end_s`` as the manifest has them, ``sha256`` of the source's bytes and, when the
            manifest names one, ``license``.
    """

    key: str
    id: str
    captions: tuple[str, ...]
    qa: tuple[QA, ...]
    kind: Kind
    frame_timestamps_s: tuple[float, ...]
    source: dict[str, Any]

    def to_json(self) -> bytes:
        """The contents of ``<key>.json``; the same metadata always gives the same bytes."""
        fields = {
            "id": self.id,
            "captions": self.captions,
            "qa": [pair._asdict() for pair in self.qa],
            "kind": self.kind,
            "frame_timestamps_s": self.frame_timestamps_s,
            "source": self.source,
        }
        return json.dumps(fields, ensure_ascii=False).encode("utf-8")

    @classmethod
    def from_json(cls, key: str, data: bytes) -> "SampleMetadata":
        """Parses ``<key>.json``.

        Raises:
            ValueError, KeyError, TypeError: the bytes are not what `to_json` writes.
        """
        fields = from_json(data)  # in a third of the time of `json.loads`
        metadata = cls(
            key=key,
            id=fields["id"],
            captions=tuple(fields["captions"]),
            qa=tuple(QA(pair["question"], pair["answer"]) for pair in fields["qa"]),
            kind=fields["kind"],
            frame_timestamps_s=tuple(fields["frame_timestamps_s"]),
            source=fields["source"],
        )
        metadata._refuse_other_types()
        return metadata

    def _refuse_other_types(self) -> None:
        """JSON that is whole may still be another tool's, which would be noticed where nobody knows the sample."""
        # JSON gives no other numbers and texts than these; sets of types are compared faster than one by one.
        if not {type(self.id), *map(type, self.captions), *map(type, chain.from_iterable(self.qa))} <= {str}:
            raise TypeError("expected texts as id, captions, questions and answers")
        if self.kind not in KINDS or not isinstance(self.source, dict):
            raise TypeError(f"expected one of {', '.join(KINDS)} as kind and an object as source")
        if not set(map(type, self.frame_timestamps_s)) <= {int, float}:
            raise TypeError("expected numbers as frame_timestamps_s")


class VideoFile(NamedTuple):
    """A stored video: its extension without a dot, an open file at the video's beginning, and the size in bytes."""

    extension: str
    file: BinaryIO
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Metadata with the encoded frames or the video, ready to be written.

    Raises:
        ValueError: no frame, too many, not one timestamp a frame, or frames beside a video.
    """

    metadata: SampleMetadata
    frames: tuple[bytes, ...]
    video: VideoFile | None = None

    def __post_init__(self) -> None:
        num_times = len(self.metadata.frame_timestamps_s)
        if self.video is not None:
            if self.frames or num_times or self.video.extension not in VIDEO_EXTENSIONS:
                raise ValueError(
                    f"{self.metadata.key}: a {self.video.extension} video with {len(self.frames)} frames and "
                    f"{num_times} timestamps; expected one of {', '.join(VIDEO_EXTENSIONS)}, and nothing beside it"
                )
        elif not 1 <= len(self.frames) <= MAX_FRAMES or len(self.frames) != num_times:
            raise ValueError(
                f"{self.metadata.key}: {len(self.frames)} frames with {num_times} "
                f"timestamps; expected one timestamp a frame, and 1 to {MAX_FRAMES} frames"
            )

    def members(self) -> Iterator[tuple[str, int, BinaryIO]]:
        """Extension, size and contents of the sample's members, in the order they are written."""
        small = [(METADATA_EXTENSION, self.metadata.to_json())]
        small.append((CAPTION_EXTENSION, self.metadata.captions[0].encode("utf-8")))
        small += [(frame_extension(number), frame) for number, frame in enumerate(self.frames)]
        for extension, data in small:
            yield extension, len(data), io.BytesIO(data)
        if self.video is not None:
            yield self.video.extension, self.video.size, self.video.file


def stored_bytes(sample: Sample) -> int:
    """Bytes that a sample takes in a tar: a header of one block for each member, contents filled up to whole blocks."""
    return sum(TAR_BLOCK_BYTES * (1 + -(-size // TAR_BLOCK_BYTES)) for _, size, _ in sample.members())


def frame_extension(number: int) -> str:
    """``000.jpg`` and so on."""
    return f"{number:03d}.jpg"


def is_frame(extension: str) -> bool:
    """Whether a member's extension is that of a frame."""
    number, _, suffix = extension.partition(".")
    return suffix == "jpg" and number.isdigit()


def is_video(extension: str) -> bool:
    """Whether a member's extension is that of a video, ours or another tool's."""
    return f".{extension.lower()}" in VIDEO_SUFFIXES
