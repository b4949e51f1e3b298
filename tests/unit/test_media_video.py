from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, ColorTrc
from media_files import constant_rate, index_of, write_flat, write_video

from alpro_stream.errors import MediaError, UnreadableError
from alpro_stream.media import FrameConfig, VideoConfig, open_media, sparse_frames, stored_video, video

CLIPS = Path(__file__, "../../../examples/clips/videos").resolve()
MAX_PIXELS = 36_000_000


def stored(path, *, start_s=None, end_s=None, **options):
    """What is stored of a file: bytes, extension and source."""
    with open_media(path) as file:
        result = stored_video(file, VideoConfig(**options), MAX_PIXELS, start_s=start_s, end_s=end_s)
        with result.file as contents:
            return contents.read(), result.extension, result.source


def every_frame(path, size=32):
    with open_media(path) as file:
        return sparse_frames(file, FrameConfig(fps=1000, max_frames=1000, size=size))


def encoded(tmp_path, path, **options):
    """The file encoded anew, as a file."""
    data, extension, _ = stored(path, reencode=True, **options)
    assert extension == "mp4"
    target = tmp_path / "encoded.mp4"
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("name", "codec", "extension"),
    [
        ("a.mp4", "libx264", "mp4"),
        ("a.mov", "libx264", "mp4"),
        ("a.mkv", "libx264", "mkv"),
        ("a.webm", "libvpx", "webm"),
        ("a.avi", "mpeg4", "avi"),
    ],
)
def test_as_it_is_the_file_is_stored(tmp_path, name, codec, extension):
    path = write_flat(tmp_path / name, (100, 128, 128), codec=codec, num_frames=20, options={})
    data, found, source = stored(path)
    assert data == path.read_bytes()
    assert found == extension
    assert (source.width, source.height, source.num_frames) == (64, 64, 20)
    assert source.duration_s == pytest.approx(2.0, abs=0.11)
    # The contents say what a file is, not its name.
    path.rename(tmp_path / "other.bin")
    assert stored(tmp_path / "other.bin")[1] == extension


def test_other_containers_have_to_be_encoded_anew(tmp_path):
    path = write_flat(tmp_path / "a.ts", (100, 128, 128), num_frames=20)
    with pytest.raises(UnreadableError, match=r"a video in mpegts cannot be stored as it is: .*video.reencode=true"):
        stored(path)
    assert stored(path, reencode=True)[2].num_frames == 20


def test_a_part_has_to_be_encoded_anew(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(30, 10))
    with pytest.raises(MediaError, match=r"a part of a video .* set video.reencode=true"):
        stored(path, start_s=1.0)
    target = encoded(tmp_path, path, start_s=1.05, end_s=2.0)
    clip = every_frame(target)
    assert [index_of(frame) for frame in clip.frames] == list(range(10, 20))
    # Frame 10 is on display at 1.05 s and frame 11 comes 0.05 s later.
    assert clip.timestamps_s == pytest.approx([0, *(0.05 + 0.1 * i for i in range(9))], abs=1e-3)
    assert clip.source.duration_s == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize("reencode", [False, True])
def test_damage_is_found(tmp_path, reencode):
    noise = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", constant_rate(40, 10), width=128, height=96, pixels=noise)
    data = bytearray(path.read_bytes())
    start, end = int(len(data) * 0.8), int(len(data) * 0.9)
    data[start:end] = np.random.default_rng(1).bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"decoding failed after \d+ frames"):
        stored(path, reencode=reencode)


@pytest.mark.parametrize("times", [[0, 100, 200, 2000, 2100, 3500, 3540], [5000 + 40 * i for i in range(30)], [0]])
def test_encoded_anew_each_frame_keeps_its_time(tmp_path, times):
    path = write_video(tmp_path / "a.mkv", times)
    before, after = every_frame(path), every_frame(encoded(tmp_path, path))
    assert after.timestamps_s == before.timestamps_s
    assert after.source.num_frames == len(times)
    assert after.source.duration_s == pytest.approx(before.source.duration_s, abs=1e-3)
    assert [index_of(frame) for frame in after.frames] == [index_of(frame) for frame in before.frames]


@pytest.mark.parametrize("name", ["v015.mp4", "v060.webm"])
def test_real_clips_keep_their_times_and_pictures(tmp_path, name):
    before, after = every_frame(CLIPS / name, 64), every_frame(encoded(tmp_path, CLIPS / name, crf=10), 64)
    assert after.timestamps_s == before.timestamps_s
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(before.frames, after.frames, strict=True)]
    assert max(errors) < 4


def test_key_frames_come_as_often_as_asked_for(tmp_path):
    path = write_video(tmp_path / "a.mkv", [0, 100, 200, 2000, 2100, 3500, 3540, 3600, 4200])
    with av.open(str(encoded(tmp_path, path, keyframe_interval_s=0.5))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [float(p.pts * p.time_base) for p in packets if p.is_keyframe] == [0, 2, 3.5, 4.2]
        assert [p.pts for p in packets] == [p.dts for p in packets], "expected no B-frames"


def test_what_is_encoded(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(10, 10), width=126, height=90)
    target = encoded(tmp_path, path, short_side=45)
    with av.open(str(target)) as container:
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.name, context.format.name, context.width, context.height) == ("h264", "yuv420p", 62, 44)
        assert (context.colorspace, context.color_range, context.color_trc, context.color_primaries) == (1, 1, 1, 1)
    data = target.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "expected the index first"
    assert data == stored(path, reencode=True, short_side=45)[0], "expected the same bytes every time"


def test_nothing_is_made_larger(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 100])
    for short_side in (256, None):
        with av.open(str(encoded(tmp_path, path, short_side=short_side))) as container:
            assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 48)


def test_square_pixels_and_the_side_that_decoders_take(tmp_path):
    path = write_flat(tmp_path / "a.mp4", (100, 128, 128), size=(48, 64), sample_aspect_ratio=Fraction(2))
    wide = write_flat(tmp_path / "b.mp4", (100, 128, 128), size=(5120, 720))
    for source, size in ((path, (96, 64)), (wide, (4096, 576))):
        with av.open(str(encoded(tmp_path, source, short_side=None))) as container:
            assert (container.streams.video[0].width, container.streams.video[0].height) == size


def test_colours_stay_and_hdr_is_tone_mapped(tmp_path):
    full_range = write_flat(
        tmp_path / "a.mp4", (81, 90, 200), pix_fmt="yuvj420p", colorspace=5, color_range=ColorRange.JPEG
    )
    hdr = write_flat(
        tmp_path / "b.mp4", (450, 512, 512), pix_fmt="yuv420p10le", colorspace=9, color_trc=ColorTrc.SMPTE2084
    )
    for path in (full_range, hdr):
        before, after = every_frame(path), every_frame(encoded(tmp_path, path, crf=1))
        np.testing.assert_allclose(after.frames[0].mean((0, 1)), before.frames[0].mean((0, 1)), atol=2)


def test_too_large_a_result_is_refused(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", constant_rate(20, 10), pixels=noise)
    monkeypatch.setattr(video, "MAX_STORED_BYTES", 10_000)
    with pytest.raises(MediaError, match=r"the encoded video has more than .*; raise video.crf"):
        stored(path, reencode=True)


def test_frames_of_too_many_pixels_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 100])
    with open_media(path) as file, pytest.raises(UnreadableError, match="more than the limit of 100"):
        stored_video(file, VideoConfig(), 100)
