"""How close to the raw libraries stored frames are decoded, from bytes in memory: `python benchmarks/decode.py`."""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from alpro_stream.stream.augment import Augment
from alpro_stream.stream.crops import draw_view
from alpro_stream.stream.dali import DaliDecoder
from alpro_stream.stream.decode import DecodeConfig, FrameDecoder, FrameError, FrameRequest
from alpro_stream.stream.jpeg import HeaderReader
from alpro_stream.stream.turbo import TurboDecoder
from benchmarks.corpus import (
    BATCH,
    IMAGE_SIZE,
    NUM_FRAMES,
    add_arguments,
    content,
    decode_raw,
    make_shards,
    open_corpus,
    open_stream,
    stored_frames,
)
from benchmarks.harness import Row, Target, main, measure

_NUM_THREADS = 2
_CALL = BATCH * NUM_FRAMES


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Raw libraries and our decoders on the same bytes, in turn."""
    with open_stream(make_shards(open_corpus(arguments.clips))) as (maker, plan):
        jpegs = stored_frames(maker, plan)
    crops, whole = _requests(jpegs, 0.875, "none"), _requests(jpegs, 1.0, "none")
    published, increasing = _requests(jpegs, 0.875, "published"), _requests(jpegs, 0.875, "increasing")
    images = _requests(jpegs, 0.875, "published", "image")
    turbo = TurboDecoder(_NUM_THREADS)
    bare = _bare_pipeline(jpegs)
    dali = DaliDecoder(DecodeConfig(backend="dali", num_workers=_NUM_THREADS), IMAGE_SIZE, _CALL, None)
    cpu_ms: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            cpu, started = time.process_time(), time.perf_counter()
            work()
            seconds = time.perf_counter() - started
            cpu_ms.setdefault(name, []).append((time.process_time() - cpu) * 1e3 / (len(jpegs) / NUM_FRAMES))
            return len(jpegs) / NUM_FRAMES / seconds

        return sample

    variants = {
        "raw libjpeg-turbo": lambda: decode_raw(jpegs),
        "libjpeg-turbo": lambda: _decode_all(turbo, crops),
        "libjpeg-turbo, published augmentation": lambda: _decode_all(turbo, published),
        "libjpeg-turbo, increasing augmentation": lambda: _decode_all(turbo, increasing),
        "libjpeg-turbo, random resized crops": lambda: _decode_all(turbo, images),
        "libjpeg-turbo, whole frames": lambda: _decode_all(turbo, whole),
        "raw DALI": lambda: [bare.run() for _ in range(len(jpegs) // _CALL)],
        "DALI": lambda: _decode_all(dali, crops),
        "DALI, published augmentation": lambda: _decode_all(dali, published),
        "DALI, whole frames": lambda: _decode_all(dali, whole),
    }
    found = measure(
        {name: timed(name, work) for name, work in variants.items()}, repetitions=3 if arguments.quick else 11
    )
    dali.close()
    turbo.close()

    def row(name: str, limit: str | None = None, target: Target | None = None) -> Row:
        details = {"CPU ms/clip": float(np.median(cpu_ms[name]))}
        return Row.of(name, found[name], "clips/s", found[limit] if limit else None, target, details, limit or "")

    return [
        row("raw libjpeg-turbo"),
        row("libjpeg-turbo", "raw libjpeg-turbo", Target(at_least=0.8, of="ratio")),
        *(row(name, "libjpeg-turbo") for name in variants if name.startswith("libjpeg-turbo,")),
        row("raw DALI", "raw libjpeg-turbo"),
        row("DALI", "raw DALI", Target(at_least=0.9, of="ratio")),
        *(row(name, "DALI") for name in variants if name.startswith("DALI,")),
    ]


def _requests(jpegs: Sequence[bytes], crop_scale: float, augment: Augment, kind: Any = "video") -> list[FrameRequest]:
    """A request for each frame; the frames of a clip share their view."""
    headers = HeaderReader()
    requests = []
    for number, jpeg in enumerate(jpegs):
        if number % NUM_FRAMES == 0:
            identity = ("benchmark", number)
            view = draw_view(kind, 256, identity, crop_scale=crop_scale, flip_probability=0.5, augment=augment)
        header = headers.read(jpeg)
        assert header is not None
        requests.append(FrameRequest(jpeg, header.width, header.height, view))
    return requests


def _decode_all(decoder: FrameDecoder, requests: Sequence[FrameRequest]) -> None:
    """As the loader does it: each call is begun before the one in front of it is waited for."""
    waiting: Callable[[], dict[int, FrameError]] = dict
    for start in range(0, len(requests), _CALL):
        part = requests[start : start + _CALL]
        room = decoder.empty((len(part), IMAGE_SIZE, IMAGE_SIZE, 3))
        following = decoder.start(part, room, range(len(part)))
        errors, waiting = waiting(), following
        assert not errors, errors
    assert not waiting()


def _bare_pipeline(jpegs: Sequence[bytes]) -> Any:
    """Decodes fused with a crop, by DALI's own external source and prefetching; outputs are dropped."""
    arrays = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
    batches = [arrays[start : start + _CALL] for start in range(0, len(arrays), _CALL)]

    @pipeline_def(batch_size=_CALL, num_threads=_NUM_THREADS, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        encoded = fn.external_source(source=batches, cycle="quiet", dtype=types.UINT8, ndim=1)
        return fn.decoders.image_crop(encoded, crop=(IMAGE_SIZE, IMAGE_SIZE), jpeg_fancy_upsampling=True)

    return pipeline()


if __name__ == "__main__":
    main("decode", rows, add_arguments, content)
