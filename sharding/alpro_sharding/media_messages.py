"""What a worker and its media processes say to each other: requests, answers and their bytes on the connection."""

import json
import os
from dataclasses import asdict, dataclass
from typing import BinaryIO, Literal

from pydantic import Field

from alpro_sharding.filters import FilterConfig
from alpro_stream.config import Config
from alpro_stream.errors import ShardError
from alpro_stream.manifest import Kind
from alpro_stream.media import FetchConfig, FrameConfig, SourceInfo, VideoConfig, window_of

Payload = Literal["frames", "video"]
MediaStage = Literal["fetch", "probe", "decode", "filter"]


class LimitConfig(Config):
    """What one file may cost; a process that exceeds it is killed, and the row is a failure."""

    fetch_s: float = Field(default=900, gt=0)
    """Longest time to fetch a file, all attempts together; of a local file, to open and hash it."""
    decode_s: float = Field(default=900, gt=0)
    """Longest time to decode and encode it."""
    fetches: int = Field(default=4, ge=1)
    """Files that a worker fetches at the same time, when media are behind addresses."""
    memory_mb: int = Field(default=560, ge=200)
    """Most memory of the process that decodes (data segment, in MiB); beyond it, allocations fail."""


class MediaOptions(Config):
    """How media become the members of a sample; see `ShardConfig`."""

    payload: Payload
    frames: FrameConfig
    video: VideoConfig
    filters: FilterConfig
    fetch: FetchConfig
    limits: LimitConfig


@dataclass(frozen=True, slots=True)
class MediaRequest:
    """A file to read.

    Attributes:
        place: absolute path or address.
        byte_range: (offset, size) of the media inside it, None for all of it.
        kind: video or image.
        start_s: start of the clip; None for the beginning.
        end_s: end of the clip; None for the end.
    """

    place: str
    byte_range: tuple[int, int] | None
    kind: Kind
    start_s: float | None
    end_s: float | None

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "MediaRequest":
        """The inverse of `to_bytes`."""
        values = json.loads(data)
        if values["byte_range"] is not None:
            values["byte_range"] = tuple(values["byte_range"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class MediaFailure:
    """Why a file gave no sample: the stage and one sentence."""

    stage: MediaStage
    reason: str


@dataclass(frozen=True, slots=True)
class MediaMember:
    """One finished member of a sample, in a buffer file that it shares with others.

    Valid until the next answer is asked for.
    """

    extension: str
    buffer: int
    offset: int
    size: int

    def read(self) -> bytes:
        """The contents."""
        data = os.pread(self.buffer, self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"the buffer holds {len(data)} of {self.size} bytes")
        return data

    def open(self) -> BinaryIO:
        """The contents as a file, for those that are too large to read at once."""
        return window_of(self.buffer, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class MediaAnswer:
    """What a file gave.

    Attributes:
        members: the frames, or the video.
        timestamps_s: when each stored frame is displayed; empty for a stored video.
        source: what was found in the file.
        sha256: digest of the file's bytes.
        sampling: how frames were chosen in the end; None for images and stored videos.
        fetch_s: seconds spent fetching and hashing.
        decode_s: seconds spent decoding and encoding.
    """

    members: tuple[MediaMember, ...]
    timestamps_s: tuple[float, ...]
    source: SourceInfo
    sha256: str
    sampling: str | None
    fetch_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding gave; the members lie in the buffer one after the other.

    Attributes:
        sizes: extension and size of each member.
        timestamps_s: as in `MediaAnswer`.
        source: as in `MediaAnswer`.
        sampling: as in `MediaAnswer`.
    """

    sizes: list[tuple[str, int]]
    timestamps_s: tuple[float, ...]
    source: SourceInfo
    sampling: str | None


def encode_answer(decoded: Decoded, sha256: str, fetch_s: float, decode_s: float) -> bytes:
    """An answer on the connection."""
    values = {**asdict(decoded), "sha256": sha256, "fetch_s": fetch_s, "decode_s": decode_s}
    return json.dumps({"answer": values}).encode()


def encode_fatal(reason: str) -> bytes:
    """Word of something that no other row will fare better with."""
    return json.dumps({"fatal": reason}).encode()


def encode_failure(failure: MediaFailure) -> bytes:
    """A failure on the connection."""
    return json.dumps({"failure": asdict(failure)}).encode()


def encode_stage(stage: str) -> bytes:
    """Word of the stage that begins now."""
    return json.dumps({"stage": stage}).encode()


def decode_message(data: bytes, buffer: int) -> MediaAnswer | MediaFailure | str:
    """What a media process says: an answer, a failure, or the name of the stage that begins.

    Raises:
        ShardError: the process met something that no other row will fare better with.
        ValueError, KeyError, TypeError: other bytes.
    """
    message = json.loads(data)
    if "fatal" in message:
        raise ShardError(str(message["fatal"]))
    if "stage" in message:
        return str(message["stage"])
    if "failure" in message:
        return MediaFailure(**message["failure"])
    values = message["answer"]
    members, offset = [], 0
    for extension, size in values["sizes"]:
        members.append(MediaMember(extension, buffer, offset, size))
        offset += size
    return MediaAnswer(
        members=tuple(members),
        timestamps_s=tuple(values["timestamps_s"]),
        source=SourceInfo(**values["source"]),
        sha256=values["sha256"],
        sampling=values["sampling"],
        fetch_s=values["fetch_s"],
        decode_s=values["decode_s"],
    )
