"""nvJPEG and NVDEC through DALI against what a CPU shows; device memory and rates."""

import io
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from media_files import constant_rate, write_video
from PIL import Image

from alpro_stream.media import FrameConfig, sparse_frames
from alpro_stream.stream.augment import RECIPES, argument_of
from alpro_stream.stream.decode import DecodeConfig, FrameRequest, VideoRequest
from alpro_stream.stream.nvdec import LocatedVideo, facts_of, nvdec_refusal
from alpro_stream.stream.turbo import TurboDecoder
from alpro_stream.stream.view import View, show

SIZE = 224
CONFIG = DecodeConfig(device="mixed", num_workers=2)
PLAIN = View((16 / 256, 8 / 256, SIZE / 256, SIZE / 256))
# nvJPEG computes the transform and the colours in other numbers: a few levels, hardly any on average.
WITHIN_JPEG = (12, 1.0)
# Decoders of video agree to the bit; chroma, scaling and the matrix are computed otherwise: much at edges only.
WITHIN_VIDEO = (64, 2.5)


def scene(seed, width, height):
    """A picture with soft colours and edges that differs from those of other seeds everywhere."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    colours = [120 + 60 * np.sin(x / 19 + phase) + 50 * np.cos(y / 13 - phase) for phase in generator.uniform(0, 6, 3)]
    picture = np.stack(colours, axis=-1)
    picture[height // 3 : height // 2, width // 4 : width // 2] = generator.integers(0, 256, 3)
    return picture.clip(0, 255).astype(np.uint8)


def jpeg(seed, width=256, height=256):
    with io.BytesIO() as file:
        Image.fromarray(scene(seed, width, height)).save(file, "JPEG", quality=90)
        return file.getvalue()


@pytest.fixture(scope="module")
def jpegs():
    return [jpeg(seed) for seed in range(16)]


@pytest.fixture
def decoder(device_id):
    from alpro_stream.stream.dali import DaliDecoder

    decoder = DaliDecoder(CONFIG, SIZE, 128, device_id)
    yield decoder
    decoder.close()


def assert_close(pixels, expected, within):
    difference = np.abs(pixels.cpu().numpy().astype(int) - expected)
    assert difference.max() <= within[0]
    assert difference.mean() <= within[1]


def on_a_cpu(requests):
    out = torch.zeros(len(requests), SIZE, SIZE, 3, dtype=torch.uint8)
    turbo = TurboDecoder(2)
    assert turbo.decode(requests, out, range(len(requests))) == {}
    turbo.close()
    return out.numpy()


def on_the_gpu(decoder, requests):
    out = torch.zeros(len(requests), SIZE, SIZE, 3, dtype=torch.uint8, device=decoder.device)
    assert decoder.decode(requests, out, range(len(requests))) == {}
    return out


def test_frames_have_the_pixels_of_the_cpu(decoder, jpegs):
    views = [PLAIN, replace(PLAIN, flip=True), View(), View((0.1, 0.2, 0.4, 0.5), "bicubic", flip=True)]
    requests = [FrameRequest(one, 256, 256, view) for one in jpegs for view in views]
    assert_close(on_the_gpu(decoder, requests), on_a_cpu(requests), WITHIN_JPEG)


def test_operations_are_those_of_the_cpu(decoder, jpegs):
    applied = {
        (operation, argument_of(operation, recipe.magnitude, "increasing", up))
        for recipe in RECIPES.values()
        for operation in recipe.operations
        for up in (True, False)
    }
    views = [replace(PLAIN, operations=(one, ("identity", 0.0))) for one in sorted(applied)]
    requests = [FrameRequest(one, 256, 256, view) for one in jpegs[:4] for view in views]
    # A factor makes differences of decoding up to 1.63 times larger, and sharpness those of neighbours too.
    assert_close(on_the_gpu(decoder, requests), on_a_cpu(requests), (32, 2.0))


def test_pixels_are_the_same_for_any_batch(decoder, jpegs):
    rotated = replace(PLAIN, operations=(("rotate", 15.0), ("shear_x", 0.15)))
    requests = [FrameRequest(one, 256, 256, view) for one in jpegs for view in (PLAIN, rotated, View())]
    together = on_the_gpu(decoder, requests)
    apart = torch.cat([on_the_gpu(decoder, [one]) for one in requests])
    assert torch.equal(together, apart)


def test_a_stream_of_its_own_sees_complete_pixels(decoder, jpegs):
    requests = [FrameRequest(one, 256, 256, PLAIN) for one in jpegs] * 8
    expected = on_the_gpu(decoder, requests)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            found = on_the_gpu(decoder, requests)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_a_frame_that_nobody_decodes_is_named(decoder, jpegs):
    requests = [FrameRequest(jpegs[0], 256, 256, PLAIN), FrameRequest(b"\xff\xd8\xff\xd9", 256, 256, View())]
    out = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8, device=decoder.device)
    assert list(decoder.decode(requests, out, range(2))) == [1]
    assert_close(out[:1], on_a_cpu(requests[:1]), WITHIN_JPEG)


@pytest.mark.parametrize("side", [256, 1024])
def test_device_memory_stays_within_what_is_declared(device_id, side):
    from alpro_stream.stream.dali import DaliDecoder, device_memory_mb

    rotated = replace(PLAIN, operations=(("rotate", 15.0), ("contrast", 0.5)))
    views = [PLAIN, rotated, View(), View(interpolation="bicubic", operations=rotated.operations)]
    requests = [FrameRequest(jpeg(seed, side, side), side, side, views[seed % 4]) for seed in range(64)]
    out = torch.zeros(64, SIZE, SIZE, 3, dtype=torch.uint8, device=device_id)
    torch.cuda.synchronize()
    free_before, _ = torch.cuda.mem_get_info(device_id)
    decoder = DaliDecoder(CONFIG, SIZE, 64, device_id)
    taken = []
    for _ in range(20):
        assert decoder.decode(requests, out, range(64)) == {}
        torch.cuda.synchronize()
        taken.append((free_before - torch.cuda.mem_get_info(device_id)[0]) / 2**20)
    decoder.close()
    assert taken[-1] <= device_memory_mb(SIZE, 64, side * side, CONFIG.num_workers)
    assert taken[-1] <= taken[4] + 1  # nothing grows


def test_rate_of_jpegs(decoder, jpegs, record_property):
    requests = [FrameRequest(one, 256, 256, PLAIN) for one in jpegs] * 8
    out = torch.zeros(len(requests), SIZE, SIZE, 3, dtype=torch.uint8, device=decoder.device)
    rates = []
    for _ in range(10):
        start = time.perf_counter()
        decoder.decode(requests, out, range(len(requests)))
        torch.cuda.synchronize()
        rates.append(len(requests) / (time.perf_counter() - start))
    record_property("frames_per_s", sorted(rates)[5])


ENCODERS = {
    "h264": ("libx264", {"bf": "2", "g": "10"}),
    "h264-open-gop": ("libx264", {"bf": "2", "g": "10", "x264-params": "open-gop=1"}),
    "hevc": ("libx265", {"x265-params": "log-level=none"}),
    "vp8": ("libvpx", {}),
    "vp9": ("libvpx-vp9", {}),
    "av1": ("libsvtav1", {"preset": "10"}),
}


@pytest.fixture(params=ENCODERS)
def video(request, tmp_path):
    codec, options = ENCODERS[request.param]
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    pixels = [scene(index, 320, 240) for index in range(30)]
    suffix = "webm" if codec.startswith("libvpx") else "mp4"
    return write_video(
        tmp_path / f"video.{suffix}",
        constant_rate(30, 25),
        codec=codec,
        width=320,
        height=240,
        pixels=pixels,
        options=options,
    )


def facts_of_file(path):
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(container.streams.video[0]) if packet.size]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return facts_of(stream, next(container.decode(stream)), len(times), len(set(times)))


def test_videos_have_the_frames_of_pyav(device_id, video):
    from alpro_stream.stream.dali import DaliVideoDecoder

    facts, view = facts_of_file(video), PLAIN
    if (refusal := nvdec_refusal(facts)) is not None:
        pytest.skip(refusal)
    with video.open("rb") as file:
        stored = sparse_frames(file, FrameConfig(fps=1000, size=256, max_frames=1000)).frames
    assert len(stored) == 30
    chosen = [(0, 9, 10, 29), (3, 3, 17, 18)]
    requests = [VideoRequest(video.read_bytes(), LocatedVideo(facts, frames, 256, 256), view) for frames in chosen]
    decoder = DaliVideoDecoder(CONFIG, SIZE, device_id)
    out = torch.zeros(2, 4, SIZE, SIZE, 3, dtype=torch.uint8, device=device_id)
    errors = decoder.decode(requests, out, [0, 1])
    decoder.close()
    if errors and all("not supported" in reason for reason in errors.values()):
        pytest.skip(errors[0])  # older GPUs have no AV1
    assert errors == {}
    expected = np.empty((SIZE, SIZE, 3), np.uint8)
    for row, frames in enumerate(chosen):
        for position, index in enumerate(frames):
            show(stored[index], view, expected)
            assert_close(out[row, position], expected, WITHIN_VIDEO)


def test_videos_of_many_sizes_stay_within_their_budget(device_id, tmp_path):
    from alpro_stream.stream.dali import DaliVideoDecoder, surfaces_mb

    decoder = DaliVideoDecoder(CONFIG, SIZE, device_id)
    out = torch.zeros(1, 2, SIZE, SIZE, 3, dtype=torch.uint8, device=device_id)
    taken = []
    for number in range(12):
        width, height = 320 + 16 * number, 240
        pixels = [scene(index, width, height) for index in range(5)]
        path = write_video(tmp_path / f"{number}.mp4", constant_rate(5, 25), width=width, height=height, pixels=pixels)
        request = VideoRequest(path.read_bytes(), LocatedVideo(facts_of_file(path), (0, 4), 256, 256), PLAIN)
        for _ in range(3):
            assert decoder.decode([request], out, [0]) == {}
        torch.cuda.synchronize()
        taken.append(torch.cuda.mem_get_info(device_id)[0] / 2**20)
    decoder.close()
    assert taken[1] - taken[-1] <= 10 * 2 * surfaces_mb(512, 240)
