"""A sample as it lies in a shard: ``<key>.json``, ``<key>.txt``, ``<key>.000.jpg`` and on, in this order."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alpro_stream.manifest import QA, Kind

METADATA_EXTENSION = "json"
CAPTION_EXTENSION = "txt"
# Three digits keep the members in order by name too.
MAX_FRAMES = 1000


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
            source, ``start_s`` and ``end_s`` as the manifest has them.
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
        fields = json.loads(data)
        return cls(
            key=key,
            id=fields["id"],
            captions=tuple(fields["captions"]),
            qa=tuple(QA(pair["question"], pair["answer"]) for pair in fields["qa"]),
            kind=fields["kind"],
            frame_timestamps_s=tuple(fields["frame_timestamps_s"]),
            source=fields["source"],
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """Metadata and the encoded frames, ready to be written.

    Raises:
        ValueError: no frame, too many, or not one timestamp a frame.
    """

    metadata: SampleMetadata
    frames: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.frames) <= MAX_FRAMES or len(self.frames) != len(self.metadata.frame_timestamps_s):
            raise ValueError(
                f"{self.metadata.key}: {len(self.frames)} frames with {len(self.metadata.frame_timestamps_s)} "
                f"timestamps; expected one timestamp a frame, and 1 to {MAX_FRAMES} frames"
            )

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Extensions and contents of the sample's members, in the order they are written."""
        yield METADATA_EXTENSION, self.metadata.to_json()
        yield CAPTION_EXTENSION, self.metadata.captions[0].encode("utf-8")
        for number, frame in enumerate(self.frames):
            yield frame_extension(number), frame


def frame_extension(number: int) -> str:
    """``000.jpg`` and so on."""
    return f"{number:03d}.jpg"


def is_frame(extension: str) -> bool:
    """Whether a member's extension is that of a frame."""
    number, _, suffix = extension.partition(".")
    return suffix == "jpg" and number.isdigit()
