"""DALI on a CPU: its pixels against libjpeg-turbo's, its augmentations against OpenCV's, its videos against PyAV's."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from media_files import constant_rate, write_video
from PIL import Image

from alpro_stream.media import FrameConfig, sparse_frames
from alpro_stream.stream.augment import RECIPES, argument_of
from alpro_stream.stream.dali import (
    DaliDecoder,
    DaliVideoDecoder,
    device_memory_mb,
    surfaces_mb,
)
from alpro_stream.stream.decode import DecodeConfig, FrameRequest, VideoRequest
from alpro_stream.stream.nvdec import LocatedVideo, VideoFacts, facts_of, nvdec_refusal
from alpro_stream.stream.turbo import TurboDecoder
from alpro_stream.stream.view import View, show

SIZE = 96
CONFIG = DecodeConfig(backend="dali")
WHOLE_PIXELS = View((3 / 120, 2 / 110, SIZE / 120, SIZE / 110))
"""A window of the image size in frames of 120 x 110 pixels."""
WITHIN_RESIZING = {"bilinear": 2, "bicubic": 4}
"""DALI resizes in floats, PyTorch in whole numbers: most levels of difference."""
WITHIN_WARPING = 8
"""OpenCV samples at 1/32 of a pixel, DALI anywhere: 1/64 of the largest difference of neighbours, in each direction."""


def scene(seed, width, height):
    """A picture with soft colours, edges and fine detail."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phases = generator.uniform(0, 6, 3)
    colours = [110 + 60 * np.sin(x / 11 + phase) + 50 * np.cos(y / 7 - phase) for phase in phases]
    picture = np.stack(colours, axis=-1) + generator.normal(0, 6, (height, width, 3))
    picture[height // 3 : height // 2, width // 4 : width // 2] = generator.integers(0, 256, 3)
    return picture.clip(0, 255).astype(np.uint8)


def jpeg(seed, width=120, height=110, mode="RGB", **options):
    with io.BytesIO() as file:
        Image.fromarray(scene(seed, width, height)).convert(mode).save(file, "JPEG", quality=90, **options)
        return file.getvalue()


def request(seed, view, width=120, height=110, **options):
    return FrameRequest(jpeg(seed, width, height, **options), width, height, view)


def decoded(decoder, requests):
    """Pixels of each request, all of which must decode."""
    out = torch.zeros(len(requests), SIZE, SIZE, 3, dtype=torch.uint8)
    assert decoder.decode(requests, out, range(len(requests))) == {}
    return out.numpy()


def assert_close(pixels, expected, most, mean=0.5):
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= most
    assert difference.mean() <= min(mean, most)


@pytest.fixture(scope="module")
def turbo():
    decoder = TurboDecoder(1)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def dali():
    decoder = DaliDecoder(CONFIG, SIZE, 40, None)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def dali_for_all():
    """Mirrors and augments by DALI's operators, which only a GPU's decoder does otherwise."""
    decoder = DaliDecoder(CONFIG, SIZE, 40, None)
    decoder._does_all = True
    yield decoder
    decoder.close()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"mode": "L"}], ids=["420", "444", "grey"])
def test_windows_have_the_pixels_of_libjpeg_turbo(dali, dali_for_all, turbo, options, flip):
    view = View(WHOLE_PIXELS.window, flip=flip)
    requests = [request(seed, view, **options) for seed in range(3)]
    expected = decoded(turbo, requests)
    np.testing.assert_array_equal(decoded(dali, requests), expected)
    np.testing.assert_array_equal(decoded(dali_for_all, requests), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(120, 110), (311, 173), (61, 45), (1, 7)])
@pytest.mark.parametrize("window", [(0, 0, 1, 1), (0.13, 0.21, 0.61, 0.5)], ids=["whole", "part"])
def test_resized_windows_are_close_to_libjpeg_turbo(dali, turbo, interpolation, size, window):
    requests = [request(5, View(window, interpolation, flip), *size) for flip in (False, True)]
    assert_close(decoded(dali, requests), decoded(turbo, requests), WITHIN_RESIZING[interpolation])


def every_operation():
    for recipe in RECIPES.values():
        for operation in recipe.operations:
            for augment in ("published", "increasing"):
                for up in (True, False):
                    yield operation, argument_of(operation, recipe.magnitude, augment, up)


@pytest.mark.parametrize("applied", sorted(set(every_operation())), ids=lambda one: f"{one[0]}-{one[1]:.3g}")
def test_dalis_operations_are_those_of_the_cpu(dali, dali_for_all, turbo, applied):
    requests = [request(seed, View(WHOLE_PIXELS.window, flip=seed == 1, operations=(applied,))) for seed in range(2)]
    expected = decoded(turbo, requests)
    warps = applied[0] in ("shear_x", "shear_y", "rotate")
    assert_close(decoded(dali_for_all, requests), expected, WITHIN_WARPING if warps else 1)
    np.testing.assert_array_equal(decoded(dali, requests), expected)


def test_two_operations_follow_each_other_and_come_after_the_resize(dali, dali_for_all, turbo):
    pairs = [
        (("rotate", 15.0), ("translate_x", 5.0)),
        (("translate_x", 5.0), ("rotate", 15.0)),
        (("contrast", 0.55), ("brightness", 1.45)),
        (("identity", 0.0), ("flip", 0.0)),
    ]
    requests = [request(3, View(WHOLE_PIXELS.window, operations=pair)) for pair in pairs]
    requests += [request(4, View((0, 0, 0.7, 0.9), "bicubic", True, pair)) for pair in pairs]
    expected = decoded(turbo, requests)
    assert_close(decoded(dali_for_all, requests), expected, WITHIN_WARPING)
    assert_close(decoded(dali, requests), expected, WITHIN_WARPING)
    assert np.abs(expected[0].astype(int) - expected[1]).max() > WITHIN_WARPING  # the order can be seen


def mixture():
    """Requests of all kinds, more than one run of each."""
    views = [
        WHOLE_PIXELS,
        View(WHOLE_PIXELS.window, flip=True),
        View((0.1, 0.1, 0.5, 0.6), "bicubic"),
        View((0, 0, 1, 1), flip=True),
        View(WHOLE_PIXELS.window, flip=True, operations=(("rotate", 15.0), ("sharpness", 1.45))),
    ]
    return [request(seed % 3, views[seed % len(views)]) for seed in range(60)]


@pytest.mark.parametrize("does_all", [False, True])
def test_the_same_pixels_for_any_batch_and_any_number_of_threads(does_all):
    requests, found = mixture(), []
    for max_frames, num_workers, order in [(60, 2, 1), (7, 0, 1), (3, 3, -1)]:
        decoder = DaliDecoder(CONFIG.model_copy(update={"num_workers": num_workers}), SIZE, max_frames, None)
        decoder._does_all = does_all
        pixels = decoded(decoder, requests[::order])[::order]
        found.append(np.stack([*pixels[:55], *decoded(decoder, requests[55:])]))
        decoder.close()
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_rows_go_where_they_belong_and_no_other_is_touched(dali, turbo):
    requests, rows = mixture()[:5], [1, 2, 4, 7, 8]
    out = torch.full((9, SIZE, SIZE, 3), 77, dtype=torch.uint8)
    assert dali.decode(requests, out, rows) == {}
    expected = decoded(turbo, requests)
    for number, row in enumerate(rows):
        assert_close(out[row].numpy(), expected[number], WITHIN_RESIZING["bicubic"])
    assert (out[[0, 3, 5, 6]] == 77).all()


def test_what_cannot_be_decoded_is_named_and_the_rest_is_there(dali):
    good = mixture()[:2]
    # Of a kind of its own: DALI gets nothing else together with bytes that may crash it.
    bad = FrameRequest(b"\xff\xd8\xff\xd9", 120, 110, View((0, 0, 1, 1)))
    expected = decoded(dali, good)
    out = torch.zeros(3, SIZE, SIZE, 3, dtype=torch.uint8)
    errors = dali.decode([good[0], bad, good[1]], out, range(3))
    assert list(errors) == [1]
    assert errors[1]
    assert "C++" not in errors[1].reason
    np.testing.assert_array_equal(out[[0, 2]].numpy(), expected)
    resized = request(1, View((0, 0, 1, 1)))
    assert decoded(dali, [resized]).any()  # the pipeline was built anew


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_calls_are_finished_in_any_order_also_where_one_has_frames_that_are_refused(dali, turbo, order):
    """What a pipeline had when it was declared invalid belongs to several calls."""
    good, bad = mixture()[:20], FrameRequest(b"\xff\xd8\xff\xd9", 120, 110, WHOLE_PIXELS)
    requests = [good, [*good[:10], bad, *good[10:]], [bad], good]
    expected = decoded(dali, good)
    rooms = [dali.empty((len(own), SIZE, SIZE, 3)) for own in requests]
    calls = [dali.start(own, room, range(len(own))) for own, room in zip(requests, rooms, strict=True)]
    errors = {number: calls[number]() for number in order}
    assert [list(errors[number]) for number in range(4)] == [[], [10], [0], []]
    for number in (0, 3):
        np.testing.assert_array_equal(rooms[number], expected)
    np.testing.assert_array_equal(np.delete(rooms[1].numpy(), 10, 0), expected)


def test_runs_of_large_frames_are_short(monkeypatch, turbo):
    monkeypatch.setattr("alpro_stream.stream.dali._MAX_RUN_PIXELS", 2 * 120 * 110)
    lengths = []
    decoder = DaliDecoder(CONFIG, SIZE, 40, None)
    begin = decoder._pipelines.begin

    def recorded(kind, runs, feed, take):
        lengths.extend(map(len, runs := list(runs)))
        return begin(kind, runs, feed, take)

    decoder._pipelines.begin = recorded
    requests = [request(seed, WHOLE_PIXELS) for seed in range(5)]
    np.testing.assert_array_equal(decoded(decoder, requests), decoded(turbo, requests))
    assert lengths == [2, 2, 1]
    decoder.close()


def test_declared_device_memory_grows_with_what_takes_it():
    usual = device_memory_mb(224, 64, 256 * 256, 2)
    assert usual < device_memory_mb(384, 64, 256 * 256, 2)
    assert usual < device_memory_mb(224, 64, 512 * 512, 2)
    # Runs are bounded, so many large frames need no more than one of them at a time.
    assert device_memory_mb(224, 1000, 36_000_000, 2) == device_memory_mb(224, 64, 36_000_000, 2)


# Stored videos. DALI decodes VP8 and VP9 on a CPU too, by the operator that uses NVDEC on a GPU.


def facts_of_file(path):
    with av.open(str(path)) as container:
        times = sorted(packet.pts for packet in container.demux(container.streams.video[0]) if packet.size)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return facts_of(stream, next(container.decode(stream)), len(times), len(set(times)))


@pytest.fixture(scope="module", params=["libvpx", "libvpx-vp9"])
def video(request, tmp_path_factory):
    pixels = [scene(index, 176, 144) for index in range(20)]
    path = tmp_path_factory.mktemp("videos") / f"{request.param}.webm"
    return write_video(path, constant_rate(20, 25), codec=request.param, width=176, height=144, pixels=pixels)


def stored_frames(path, size):
    with path.open("rb") as file:
        return sparse_frames(file, FrameConfig(fps=1000, size=size, max_frames=1000)).frames


def test_frames_of_videos_are_those_of_pyav(video, turbo):
    size = 112
    facts = facts_of_file(video)
    assert nvdec_refusal(facts) is None
    chosen = [(0, 7, 7, 19), (3, 4, 5, 11)]
    views = [View((8 / size, 3 / size, SIZE / size, SIZE / size), flip=True)]
    views += [View((0.1, 0, 0.6, 0.5), "bicubic", operations=(("rotate", 15.0), ("contrast", 1.45)))]
    requests = [
        VideoRequest(video.read_bytes(), LocatedVideo(facts, frames, size, size), view)
        for frames, view in zip(chosen, views, strict=True)
    ]
    decoder = DaliVideoDecoder(CONFIG, SIZE, None)
    out = torch.zeros(3, 4, SIZE, SIZE, 3, dtype=torch.uint8)
    assert decoder.decode(requests, out, [0, 2]) == {}
    decoder.close()
    stored = stored_frames(video, size)
    assert len(stored) == 20
    for row, frames, view in zip([0, 2], chosen, views, strict=True):
        for position, index in enumerate(frames):
            expected = np.empty((SIZE, SIZE, 3), np.uint8)
            show(stored[index], view, expected)
            # Other filters for chroma and for scaling: much at edges, little in all. Another frame is far away.
            assert_close(out[row, position].numpy(), expected, 64, 2.0)
            other = np.empty_like(expected)
            show(stored[(index + 1) % 20], view, other)
            assert np.abs(out[row, position].numpy() - other.astype(int)).mean() > 10
    assert not out[1].any()


def test_damaged_videos_and_wrong_indices_are_named_and_the_rest_is_there(video):
    facts, whole, view = facts_of_file(video), video.read_bytes(), View((0, 0, 1, 1))
    requests = [
        VideoRequest(whole, LocatedVideo(facts, (0, 1), 112, 112), view),
        VideoRequest(whole, LocatedVideo(facts, (5, 20), 112, 112), view),
        VideoRequest(b"no video", LocatedVideo(facts, (0, 1), 112, 112), view),
        VideoRequest(whole, LocatedVideo(facts, (18, 19), 112, 112), view),
    ]
    decoder = DaliVideoDecoder(CONFIG, SIZE, None)
    out = torch.zeros(4, 2, SIZE, SIZE, 3, dtype=torch.uint8)
    errors = decoder.decode(requests, out, range(4))
    assert sorted(errors) == [1, 2]
    assert "20" in errors[1]
    assert out[0].any()
    assert out[3].any()
    assert not out[1:3].any()
    decoder.close()


GOOD = VideoFacts("h264", 640, 360, "yuv420p", 2, 2, 0, 0.0, False, 100, 100)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"matrix": 6, "width": 1920, "height": 1080}, None),
        ({"codec": "mpeg4"}, "codec"),
        ({"pixel_format": "yuv420p10le"}, "pixel format"),
        ({"pixel_format": "yuv444p"}, "pixel format"),
        ({"colour_range": 2}, "full-range"),
        ({"transfer": 16}, "HDR"),
        ({"transfer": 18}, "HDR"),
        ({"matrix": 1}, "BT.601"),
        ({"width": 1280, "height": 720}, "BT.601"),
        ({"rotation": -90.0}, "rotation"),
        ({"is_interlaced": True}, "interlaced"),
        ({"width": 321}, "odd"),
        ({"height": 142}, "sides"),
        ({"width": 4100, "matrix": 6}, "sides"),
        ({"num_packets": 101}, "packets"),
    ],
)
def test_nvdec_gets_only_what_dali_shows_as_pyav_does(change, reason):
    found = nvdec_refusal(replace(GOOD, **change))
    assert found is None if reason is None else reason in found


def test_a_refused_video_is_not_decoded(video):
    facts = replace(facts_of_file(video), rotation=90.0)
    out = torch.zeros(1, 1, SIZE, SIZE, 3, dtype=torch.uint8)
    decoder = DaliVideoDecoder(CONFIG, SIZE, None)
    errors = decoder.decode([VideoRequest(video.read_bytes(), LocatedVideo(facts, (0,), 64, 64), View())], out, [0])
    assert "rotation" in errors[0]
    assert not out.any()


def test_sizes_of_videos_are_bounded_by_the_surfaces_they_take():
    decoder = DaliVideoDecoder(CONFIG, SIZE, None, max_surfaces_mb=200)
    sizes = [replace(GOOD, matrix=6, width=1920 + 2 * extra, height=1080) for extra in range(9)]
    for facts in sizes:
        decoder._make_room([facts])
        assert (facts.codec, facts.width, facts.height) in decoder._sizes
        assert sum(surfaces_mb(width, height) for _, width, height in decoder._sizes) <= 200
    assert 1 < len(decoder._sizes) < 9


def test_what_is_refused_does_not_depend_on_what_came_before(video):
    """Room for no size of video at all: each is decoded all the same, with the same pixels."""
    facts, data = facts_of_file(video), video.read_bytes()
    request = VideoRequest(data, LocatedVideo(facts, (0, 3), 112, 112), View((0, 0, 1, 1)))
    small, large = (DaliVideoDecoder(CONFIG, SIZE, None, max_surfaces_mb=most) for most in (0, 2048))
    found = []
    for decoder in (small, large):
        for _ in range(2):
            out = torch.zeros(1, 2, SIZE, SIZE, 3, dtype=torch.uint8)
            assert decoder.decode([request], out, [0]) == {}
            found.append(out)
        decoder.close()
    assert all(torch.equal(out, found[0]) for out in found)
