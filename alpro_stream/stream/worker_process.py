"""The process of a worker: stored frames to pixels, in memory that it shares with the one that started it.

Started by `workers` as a `KillableProcess` with that memory as its open file. A request only says where in it a share
of frames is described: large messages could block both sides. It says an empty word when it is there, another one when
it has loaded what resizing takes, and answers each share.
"""

import json
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpro_stream.media.killable import connect
from alpro_stream.stream.regions import Region, map_region
from alpro_stream.stream.turbo_frame import decode_frame
from alpro_stream.stream.view import View, load_resizing


class SharedFrame(NamedTuple):
    """One frame to decode.

    Attributes:
        number: of the request, for the answer.
        start: where its bytes begin in the region of the stored bytes.
        size: of them.
        width: of the stored frame, in pixels.
        height: of the stored frame, in pixels.
        view: what is seen of it.
        place: the byte in the region of the pixels where those of this frame begin.
    """

    number: int
    start: int
    size: int
    width: int
    height: int
    view: View
    place: int


class Share(NamedTuple):
    """What a worker gets of a call.

    Attributes:
        jpegs: where the stored bytes are.
        pixels: where the pixels go.
        image_size: side of the pixels.
        resizes: whether some window has another size.
        frames: to decode.
    """

    jpegs: Region
    pixels: Region
    image_size: int
    resizes: bool
    frames: tuple[SharedFrame, ...]


def encode_share(share: Share) -> bytes:
    """What a worker finds in the memory."""
    return pickle.dumps(share, pickle.HIGHEST_PROTOCOL)


def encode_request(number: int, region: Region, size: int) -> bytes:
    """What a worker reads: number of a share, and how many bytes at the beginning of which region describe it."""
    return json.dumps([number, *region, size]).encode()


def encode_answer(number: int, errors: Mapping[int, str]) -> bytes:
    """What `decode_answer` reads."""
    return json.dumps([number, list(errors.items())]).encode()


def decode_answer(data: bytes) -> tuple[int, dict[int, str]]:
    """Number of the share, and what is wrong with requests of it, by number.

    JSON, as the process that sent it decodes foreign bytes and is not trusted.

    Raises:
        ValueError: it is no answer.
    """
    try:
        number, errors = json.loads(data)
        if type(number) is int and all([*map(type, one)] == [int, str] for one in errors):
            return number, {of: reason for of, reason in errors}
    except (TypeError, RecursionError) as error:
        raise ValueError("not an answer") from error
    raise ValueError("not an answer")


def main(arguments: list[str]) -> None:
    """Answers shares until nobody sends any."""
    connection, (descriptor,) = connect(arguments)
    connection.recv_bytes()  # its settings: there are none
    mapped: dict[Region, NDArray[np.uint8]] = {}
    has_loaded = False

    def at(region: Region) -> NDArray[np.uint8]:
        if region not in mapped:
            mapped[region] = map_region(descriptor, region)
        return mapped[region]

    with suppress(EOFError, OSError):
        connection.send_bytes(b"")
        while True:
            number, offset, size, length = json.loads(connection.recv_bytes())
            share: Share = pickle.loads(at(Region(offset, size))[:length].data)
            if share.resizes and not has_loaded:
                load_resizing()
                has_loaded = True
                connection.send_bytes(b"")
            connection.send_bytes(encode_answer(number, _decode(share, at(share.jpegs), at(share.pixels))))


def _decode(share: Share, jpegs: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> dict[int, str]:
    stored = jpegs.data
    shape = (share.image_size, share.image_size, 3)
    errors = {}
    for one in share.frames:
        out_HWC = pixels[one.place : one.place + 3 * share.image_size**2].reshape(shape)
        error = decode_frame(stored[one.start : one.start + one.size], one.width, one.height, one.view, out_HWC)
        if error is not None:
            errors[one.number] = error
    return errors


if __name__ == "__main__":
    main(sys.argv[1:])
