"""The process in which stored videos and unusual pictures are decoded: it may hang or crash.

Started by `isolated` as a `KillableProcess` with one open file. That holds the bytes of the request, and then the
pixels of the answer. It imports no torch, which takes seconds to load.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, read_whole_image, sparse_frames, window_of
from alpro_stream.media.killable import connect, limit_memory, write_all
from alpro_stream.stream.frames import FramePolicy, choose_frames
from alpro_stream.stream.nvdec import LocatedVideo, VideoFacts, locate_video
from alpro_stream.stream.seeds import Draws

# An answer has to be small, and some libraries put much into their messages.
_MAX_REASON = 1000


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which frames of a clip are wanted.

    Attributes:
        num_frames: how many.
        policy: how they are chosen among the stored ones.
        identity: names the draws of the choice.
        stored: where a whole video is stored: the frames that a data set of frames would hold, and their size.
    """

    num_frames: int
    policy: FramePolicy
    identity: tuple[int | str, ...]
    stored: FrameConfig

    def among(self, num_stored: int) -> list[int]:
        """Numbers of the wanted frames, ascending; some may repeat."""
        draws = Draws("frames", *self.identity)
        return choose_frames(num_stored, self.num_frames, self.policy, draws)


@dataclass(frozen=True, slots=True)
class PicturesRequest:
    """Pictures to decode, one after the other in the open file.

    Attributes:
        sizes: bytes of each.
        wanted: whether their pixels are, or only the word that there are some.
    """

    sizes: tuple[int, ...]
    wanted: bool


@dataclass(frozen=True, slots=True)
class LocateRequest:
    """A stored video whose wanted frames are to be found, for another decoder."""

    choice: FrameChoice


Request = FrameChoice | PicturesRequest | LocateRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        reason: what is wrong with the sample, in a sentence; empty where nothing is.
        sizes: (height, width) of each picture whose pixels are in the open file.
        located: where the frames of a video are.
    """

    reason: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    located: LocatedVideo | None = None


def encode_request(request: Request) -> bytes:
    """What `decode_request` reads."""
    return json.dumps(asdict(request), default=FrameConfig.model_dump).encode()


def decode_request(data: bytes) -> Request:
    """The inverse of `encode_request`."""
    values = json.loads(data)
    if "sizes" in values:
        return PicturesRequest(tuple(values["sizes"]), values["wanted"])
    if "choice" in values:
        return LocateRequest(_choice(values["choice"]))
    return _choice(values)


def encode_answer(answer: Answer) -> bytes:
    """What `decode_answer` reads."""
    located = answer.located and asdict(answer.located)
    return json.dumps([answer.reason[:_MAX_REASON], answer.sizes, located]).encode()


def decode_answer(data: bytes) -> Answer:
    """The inverse of `encode_answer`.

    Raises:
        ValueError: it is none; the process that sent it is not trusted.
    """
    match json.loads(data):
        case [str(reason), list(sizes), None] if all(_is_size(size) for size in sizes):
            return Answer(reason, tuple((height, width) for height, width in sizes))
        case ["", [], {"facts": dict(facts), "frames": list(frames), "width": int(width), "height": int(height)}]:
            if not all(isinstance(frame, int) and frame >= 0 for frame in frames):
                raise ValueError("no answer")
            try:
                return Answer(located=LocatedVideo(VideoFacts(**facts), tuple(frames), width, height))
            except TypeError as error:
                raise ValueError("no answer") from error
    raise ValueError("no answer")


def main(arguments: list[str]) -> None:
    """Says that it is ready, by an empty word, and answers requests until the connection ends."""
    connection, (buffer,) = connect(arguments)
    memory_mb = int(connection.recv_bytes())
    limit_memory(memory_mb << 20)
    warnings.simplefilter("ignore")
    with suppress(EOFError, OSError, KeyboardInterrupt):  # the other process ended
        connection.send_bytes(b"")
        while True:
            request = decode_request(connection.recv_bytes())
            connection.send_bytes(encode_answer(_answer(request, buffer, memory_mb)))


def _answer(request: Request, buffer: int, memory_mb: int) -> Answer:
    try:
        if isinstance(request, PicturesRequest):
            return _decode_pictures(request, buffer)
        if isinstance(request, LocateRequest):
            return _locate(request.choice, buffer)
        return _decode_video(request, buffer)
    except MediaError as error:
        return Answer(str(error) or "it cannot be decoded")
    except MemoryError:
        return Answer(f"it needs more memory than {memory_mb} MiB")
    except Exception as error:  # one strange file must not cost the other samples
        return Answer(f"unexpected {type(error).__name__}: {error}")


def _decode_pictures(request: PicturesRequest, buffer: int) -> Answer:
    pictures, position = [], 0
    for number, size in enumerate(request.sizes):
        try:
            if size == 0:
                raise MediaError("it is empty")
            with window_of(buffer, position, size) as file:
                picture = read_whole_image(file, FrameConfig().max_pixels)
        except MediaError as error:
            raise MediaError(f"frame {number} of {len(request.sizes)}: {error}") from error
        position += size
        if request.wanted:
            pictures.append(picture)
    return _hand_over(pictures, buffer)


def _locate(choice: FrameChoice, buffer: int) -> Answer:
    with _video(buffer) as video:
        return Answer(located=locate_video(video, choice.stored, choice.among))


def _decode_video(request: FrameChoice, buffer: int) -> Answer:
    with _video(buffer) as video:
        return _hand_over(sparse_frames(video, request.stored, choose=request.among).frames, buffer)


def _video(buffer: int) -> BinaryIO:
    size = os.fstat(buffer).st_size
    if size == 0:
        raise MediaError("the video is empty")
    return window_of(buffer, 0, size)


def _choice(values: dict[str, Any]) -> FrameChoice:
    return FrameChoice(**{**values, "identity": tuple(values["identity"]), "stored": FrameConfig(**values["stored"])})


def _hand_over(pictures: Iterable[NDArray[np.uint8]], buffer: int) -> Answer:
    """Puts pixels into the open file, over the request."""
    os.lseek(buffer, 0, os.SEEK_SET)
    sizes = []
    for picture in pictures:
        write_all(buffer, np.ascontiguousarray(picture).data)
        sizes.append((picture.shape[0], picture.shape[1]))
    return Answer(sizes=tuple(sizes))


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)


if __name__ == "__main__":
    main(sys.argv[1:])
