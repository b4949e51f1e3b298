"""Stored frames by nvJPEG and stored videos by NVDEC, through our decoders, over DALI alone on the same bytes.

Clips of 4 frames of 224 pixels, from bytes in memory to pixels on the device. The stored frames are those of the
example clips; the videos are made up, to have the same ones in H.264 and HEVC. Without a GPU DALI decodes on the CPU,
and videos are VP8 and VP9.
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch

from alpro_stream.errors import AlproError
from alpro_stream.media.frames import sparse_frames
from alpro_stream.media.images import encode_jpeg
from alpro_stream.media.options import FrameConfig
from alpro_stream.stream.crops import draw_view
from alpro_stream.stream.decode import DecodeConfig, FrameDecoder, FrameRequest, VideoRequest, build_decoder
from alpro_stream.stream.isolated import FrameChoice
from alpro_stream.stream.nvdec import locate_video, nvdec_refusal
from alpro_stream.stream.view import View
from benchmarks.corpus import BATCH, EXAMPLES, IMAGE_SIZE, NUM_FRAMES
from benchmarks.gpu_pieces.piece import LeftOutError, Parts, Setting
from benchmarks.harness import Row, Target, measure
from benchmarks.timing import wait_for_device

_STORED = FrameConfig()
_WIDTH, _HEIGHT, _NUM_VIDEO_FRAMES = 640, 360, 100
_RUNS_AHEAD = 2
_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp8": "libvpx", "vp9": "libvpx-vp9"}


def parts(setting: Setting) -> Parts:
    codecs = ("h264", "hevc") if setting.is_cuda else ("vp8", "vp9")
    jpegs = cache(partial(example_frames, 32 if setting.is_quick else 4096))
    return {
        "frames": lambda: frames(setting, jpegs()),
        **{f"videos, {codec}": partial(videos, setting, codec) for codec in codecs},
    }


def frames(setting: Setting, jpegs: Sequence[bytes]) -> Sequence[Row]:
    """Ours with and without augmentation, DALI alone, and libjpeg-turbo on the host's cores with a copy to the GPU."""
    call = 8 if setting.is_quick else BATCH * NUM_FRAMES
    views = {
        "frames": _views(len(jpegs), "none"),
        "frames, published augmentation": _views(len(jpegs), "published"),
    }
    requests = {
        name: [FrameRequest(jpeg, 256, 256, view) for jpeg, view in zip(jpegs, chosen, strict=True)]
        for name, chosen in views.items()
    }
    ours = build_decoder(_config(setting), IMAGE_SIZE, call, _device_id(setting))
    host = build_decoder(_config(setting, backend="libjpeg-turbo", device="cpu"), IMAGE_SIZE, call, None)
    bare = _pipeline("image_crop", setting, {"encoded": list(jpegs)}, call)
    variants: dict[str, Callable[[], float]] = {
        "alone": lambda: _rate(len(jpegs), lambda: _run(bare, len(jpegs) // call)),
        "host": lambda: _rate(len(jpegs), lambda: _decode(host, requests["frames"], call, setting.device)),
        **{name: partial(_frames_rate, ours, each, call) for name, each in requests.items()},
    }
    try:
        rates = measure(variants, setting.repetitions(9))
    finally:
        ours.close()
        host.close()
    where = "mixed" if setting.is_cuda else "cpu"
    target = None if setting.is_quick else Target(at_least=0.9, of="ratio")
    return [
        Row.of(f"frames, DALI {where}", rates["frames"], "clips/s", rates["alone"], target, limit_of="DALI alone"),
        Row.of(
            f"frames, DALI {where}, published augmentation",
            rates["frames, published augmentation"],
            "clips/s",
            rates["frames"],
            limit_of="without augmentation",
        ),
        Row.of("frames, libjpeg-turbo on the host", rates["host"], "clips/s", rates["frames"], limit_of="DALI"),
    ]


def videos(setting: Setting, codec: str) -> Sequence[Row]:
    """Four frames of each video; ours resize and crop them, DALI alone does not."""
    from alpro_stream.stream.dali import DaliVideoDecoder

    data = made_up_video(codec, 10 if setting.is_quick else _NUM_VIDEO_FRAMES)
    count = 4 if setting.is_quick else 32
    run = 2 if setting.is_quick else 4
    choice = FrameChoice(NUM_FRAMES, "uniform", ("benchmark",), _STORED)
    located = locate_video(io.BytesIO(data), _STORED, choice.among)
    if refusal := nvdec_refusal(located.facts):
        raise AlproError(f"the made-up video is not decoded by NVDEC: {refusal}")
    view = View((0, 0, 0.875, 0.875))
    requests = [VideoRequest(data, located, view) for _ in range(count)]
    out = torch.empty(count, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=setting.device)
    decoder = DaliVideoDecoder(_config(setting), IMAGE_SIZE, _device_id(setting))
    bare = _pipeline("video", setting, {"encoded": [data] * count, "frames": [located.frames] * count}, run)

    def ours() -> None:
        if errors := decoder.decode(requests, out, range(count)):
            raise AlproError(f"{len(errors)} of {count} videos are not decoded: {next(iter(errors.values()))}")

    variants = {
        "ours": lambda: _rate(count * NUM_FRAMES, ours),
        "alone": lambda: _rate(count * NUM_FRAMES, lambda: _run(bare, count // run)),
    }
    try:
        rates = measure(variants, setting.repetitions(7))
    finally:
        decoder.close()
    where = "NVDEC" if setting.is_cuda else "DALI cpu"
    size = f"{_WIDTH} x {_HEIGHT}"
    return [
        Row.of(f"videos, {where}, {codec} of {size}", rates["ours"], "clips/s", rates["alone"], limit_of="DALI alone")
    ]


def example_frames(count: int, folder: Path = EXAMPLES) -> list[bytes]:
    """Stored frames of the example clips, as shards have them, each perhaps several times.

    Raises:
        LeftOutError: the clips are not there.
    """
    if not folder.is_dir():
        raise LeftOutError(f"{folder} is not there: run this in the folder of a checkout")
    found: list[bytes] = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found += [encode_jpeg(pixels, 90) for pixels in sparse_frames(file, _STORED).frames]
        if len(found) >= count:
            break
    return list(islice(cycle(found), count))


def made_up_video(codec: str, num_frames: int) -> bytes:
    """A picture that moves, in colours of BT.601 and limited range.

    Raises:
        LeftOutError: PyAV has no encoder for it.
    """
    encoder = _ENCODERS[codec]
    if encoder not in av.codecs_available:
        raise LeftOutError(f"PyAV has no encoder {encoder} to make a video with")
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    picture = np.stack(
        [128 + 60 * np.sin(x / 19 + phase) + 50 * np.cos(y / 13 - phase) for phase in (0, 2, 4)], axis=-1
    )
    pixels = picture.astype(np.uint8)
    options = {"libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}
    with TemporaryDirectory(prefix="alpro-gpu-") as name:
        path = Path(name) / f"video.{'webm' if codec.startswith('vp') else 'mp4'}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(encoder, rate=25, options=options.get(encoder, {"deadline": "realtime"}))
            stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
            stream.time_base = Fraction(1, 25)
            for index in range(num_frames):
                frame = av.VideoFrame.from_ndarray(np.roll(pixels, 3 * index, axis=1), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path.read_bytes()


def _config(setting: Setting, **changes: Any) -> DecodeConfig:
    device = "mixed" if setting.is_cuda else "cpu"
    threads = 2 if setting.is_quick else 4
    values = {"device": device, "backend": "dali", "workers": "threads", "num_workers": threads, **changes}
    return DecodeConfig.model_validate(values)


def _device_id(setting: Setting) -> int | None:
    return 0 if setting.is_cuda else None


def _views(count: int, augment: Any) -> list[View]:
    """One for each frame; the frames of a clip share theirs."""
    return [
        draw_view(
            "video",
            256,
            ("benchmark", number // NUM_FRAMES),
            crop_scale=0.875,
            flip_probability=0.5,
            augment=augment,
        )
        for number in range(count)
    ]


def _frames_rate(decoder: FrameDecoder, requests: Sequence[FrameRequest], call: int) -> float:
    return _rate(len(requests), lambda: _decode(decoder, requests, call))


def _rate(num_frames: int, work: Callable[[], object]) -> float:
    """Clips a second."""
    wait_for_device()
    started = time.perf_counter()
    work()
    wait_for_device()
    return num_frames / NUM_FRAMES / (time.perf_counter() - started)


def _decode(
    decoder: FrameDecoder, requests: Sequence[FrameRequest], call: int, device: torch.device | None = None
) -> None:
    """As the loader does it: each call is begun before the one in front of it is waited for.

    Where a GPU is given, what the host decoded goes there as a batch does: from pinned memory, while more is decoded.
    """
    done: torch.Tensor | None = None
    waiting: Callable[[], Mapping[int, object]] = dict
    for start in range(0, len(requests) + call, call):
        part = requests[start : start + call]
        out = decoder.empty((len(part), IMAGE_SIZE, IMAGE_SIZE, 3))
        following = decoder.start(part, out, range(len(part))) if part else dict
        errors, waiting = waiting(), following
        if errors:
            raise AlproError(f"{len(errors)} of {call} frames are not decoded: {next(iter(errors.values()))}")
        if done is not None and device is not None and device.type == "cuda":
            done.pin_memory().to(device, non_blocking=True)
        done = out


def _run(pipeline: Any, count: int) -> None:
    """So many runs, two of them ahead, and none when it begins or ends: with `pipeline.run` some are always done."""
    for number in range(count + _RUNS_AHEAD):
        if number < count:
            pipeline.schedule_run()
        if number >= _RUNS_AHEAD:
            pipeline.share_outputs()
            pipeline.release_outputs()


def _pipeline(operator: str, setting: Setting, inputs: Mapping[str, Sequence[Any]], batch: int) -> Any:
    """Nothing but a decoder of DALI's, by its own external source and prefetching; outputs are dropped."""
    from nvidia.dali import fn, pipeline_def, types

    import alpro_stream.stream.dali  # noqa: F401  # says what to install where DALI is missing

    device = "mixed" if setting.is_cuda else "cpu"
    encoded = [np.frombuffer(data, np.uint8) for data in inputs["encoded"]]
    data = [encoded[start : start + batch] for start in range(0, len(encoded), batch)]

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch,
        num_threads=_config(setting).num_workers,
        device_id=_device_id(setting),
        prefetch_queue_depth=_RUNS_AHEAD,
        exec_dynamic=True,
    )
    def pipeline() -> Any:
        bytes_of = fn.external_source(source=data, cycle="quiet", dtype=types.UINT8, ndim=1)
        if operator == "image_crop":
            crop = (IMAGE_SIZE, IMAGE_SIZE)
            return fn.decoders.image_crop(bytes_of, crop=crop, device=device, jpeg_fancy_upsampling=True)
        wanted = [np.array([inputs["frames"][0]] * batch, np.int32)]
        numbers = fn.external_source(source=wanted, cycle="quiet", dtype=types.INT32, ndim=1)
        return fn.decoders.video(bytes_of, frames=numbers, device=device, pad_mode="none")

    return pipeline()
