import os
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from media_files import constant_rate, index_of, write_audio, write_image, write_video

from alpro_stream.errors import MediaError
from alpro_stream.media import UnreadableError, probe_video, sparse_frames


def indices(clip):
    return [index_of(frame) for frame in clip.frames]


def test_frames_on_display_at_the_grid_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 25))
    clip = sparse_frames(path, fps=3, size=32)
    # 0, 1/3, 2/3, 1, 4/3, 5/3 s at 25 frames a second
    assert indices(clip) == [0, 8, 16, 25, 33, 41]
    assert clip.timestamps_s == (0.0, 0.32, 0.64, 1.0, 1.32, 1.64)
    assert all(frame.shape == (32, 32, 3) and frame.dtype == np.uint8 for frame in clip.frames)
    assert (clip.source.width, clip.source.height, clip.source.codec) == (64, 48, "h264")
    assert clip.source.num_frames == 50
    assert clip.source.duration_s == pytest.approx(2.0, abs=0.02)


def test_variable_rate_stores_a_long_shown_frame_once(tmp_path):
    path = write_video(tmp_path / "vfr.mkv", [0, 100, 200, 2000, 2100, 3500, 3540])
    clip = sparse_frames(path, fps=1)
    # Frame 2 is on display at 1 s, frame 3 at 2 s, frame 4 at 3 s; frames 1, 5 and 6 never at a grid time.
    assert indices(clip) == [0, 2, 3, 4]
    assert clip.timestamps_s == (0.0, 0.2, 2.0, 2.1)


def test_a_slow_video_stores_each_frame_once(tmp_path):
    path = write_video(tmp_path / "slow.mp4", [0, 4000, 8000])
    assert indices(sparse_frames(path, fps=3)) == [0, 1, 2]


def test_a_file_that_does_not_start_at_zero(tmp_path):
    path = write_video(tmp_path / "late.mkv", [5000 + t for t in constant_rate(20, 10)])
    clip = sparse_frames(path, fps=1)
    assert (indices(clip), clip.timestamps_s) == ([0, 10], (0.0, 1.0))


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video")])
def test_other_containers(tmp_path, name, codec):
    # MPEG-2 and AVI know fixed rates only.
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, bit_rate=2_000_000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(30):
            picture = np.full((48, 64, 3), 8 + 4 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert indices(sparse_frames(path, fps=5)) == [0, 5, 10, 15, 20, 25]


def test_a_long_clip_is_spread_over_its_whole_length(tmp_path):
    path = write_video(tmp_path / "long.mp4", constant_rate(60, 5))
    assert indices(sparse_frames(path, fps=5, max_frames=4)) == [0, 16, 40, 56]
    assert len(sparse_frames(path, fps=5, max_frames=59).frames) == 59
    assert indices(sparse_frames(path, fps=5, max_frames=60)) == list(range(60))


def test_start_and_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 10))
    clip = sparse_frames(path, fps=2, start_s=1.25, end_s=2.5)
    # on display at 1.25, 1.75 and 2.25 s
    assert indices(clip) == [12, 17, 22]
    assert clip.timestamps_s == (1.2, 1.7, 2.2)
    assert (clip.source.num_frames, clip.source.duration_s) == (13, 1.25)


def test_a_clip_late_in_the_file_is_the_same_with_and_without_seeking(tmp_path, monkeypatch):
    # A key frame every 10 frames: seeking to 9.0 s lands at frame 40.
    path = write_video(tmp_path / "a.mp4", constant_rate(55, 5))
    sought = sparse_frames(path, fps=2, start_s=9.0)
    monkeypatch.setattr("alpro_stream.media.frames._MIN_SEEK_S", Fraction(10**6))
    decoded = sparse_frames(path, fps=2, start_s=9.0)
    assert indices(sought) == indices(decoded) == [45, 47, 50, 52]
    assert sought.timestamps_s == decoded.timestamps_s


def test_a_start_after_the_end_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(10, 10))
    with pytest.raises(MediaError, match=r"no frame after the clip's start at 7 s: the video ends at 1 s"):
        sparse_frames(path, start_s=7.0)


def test_one_frame(tmp_path):
    clip = sparse_frames(write_video(tmp_path / "one.mp4", [0]))
    assert (indices(clip), clip.timestamps_s, clip.source.num_frames) == ([0], (0.0,), 1)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path, degrees):
    # Left half red, right half blue; the matrix of the MP4 track header is patched in.
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32, 0] = picture[:, 32:, 2] = 255
    path = write_video(tmp_path / "a.mp4", [0, 100], pixels=[picture, picture])
    _patch_rotation(path, degrees)
    clip = sparse_frames(path, size=32)
    # FFmpeg's players turn the picture clockwise by what the file calls its rotation.
    expected = np.rot90(picture[::2, ::2], k=-degrees // 90)
    red_expected = np.argwhere(expected[..., 0] > 128).mean(0) / expected.shape[:2]
    red_found = np.argwhere(clip.frames[0][..., 0] > 128).mean(0) / 32
    np.testing.assert_allclose(red_found, red_expected, atol=0.06)
    assert (clip.source.width, clip.source.height) == ((64, 48) if degrees == 180 else (48, 64))


def _patch_rotation(path, degrees):
    one, cos, sin = 1 << 16, round(np.cos(np.radians(degrees))), round(np.sin(np.radians(degrees)))
    data = bytearray(path.read_bytes())
    identity = b"".join(v.to_bytes(4, "big") for v in (one, 0, 0, 0, one, 0, 0, 0, 1 << 30))
    turned = b"".join(
        (v & 0xFFFFFFFF).to_bytes(4, "big") for v in (cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    )
    start = data.index(identity, data.index(b"tkhd"))
    data[start : start + len(turned)] = turned
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
@pytest.mark.parametrize("limits", ["MPEG", "JPEG"])
def test_colours_follow_the_files_matrix_and_range(tmp_path, matrix, limits):
    color = (200, 60, 30)
    path = tmp_path / "color.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace[matrix], ColorRange[limits]
        rgb = av.VideoFrame.from_ndarray(np.full((64, 64, 3), color, np.uint8), format="rgb24")
        yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace[matrix], dst_color_range=ColorRange[limits])
        container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    (frame,) = sparse_frames(path, size=32).frames
    np.testing.assert_allclose(frame.reshape(-1, 3).mean(0), color, atol=3)


def test_decoding_twice_gives_the_same_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 90, 126, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", constant_rate(12, 6), width=126, height=90, pixels=noise)
    first, second = sparse_frames(path), sparse_frames(path)
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, second.frames, strict=True))


def test_damage_in_the_middle_is_refused_with_the_number_of_frames(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", constant_rate(40, 10), codec="libx264", width=128, height=96, pixels=noise)
    data = bytearray(path.read_bytes())
    start, end = int(len(data) * 0.4), int(len(data) * 0.6)
    data[start:end] = np.random.default_rng(1).bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"decoding failed after \d+ frames"):
        sparse_frames(path)


def cut_off(path):
    write_video(path, constant_rate(30, 10))
    path.write_bytes(path.read_bytes()[:-200])  # the index stands at the end


def header_only(path):
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def playlist(path):
    write_video(path.with_name("secret.mp4"), [0, 100])
    path.write_text(f"ffconcat version 1.0\nfile '{path.with_name('secret.mp4')}'\n")


def m3u8(path):
    secret = write_video(path.with_name("secret.ts"), [0, 100])
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{secret}\n#EXT-X-ENDLIST\n")


BAD = {
    "cut off": (cut_off, "no video container"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("this is no video\n" * 20), "no video container"),
    "image": (lambda path: write_image(path.with_suffix(".jpg")).rename(path), "not one of the accepted formats"),
    "audio only": (write_audio, "no video stream"),
    "header only": (header_only, "holds no frame"),
    "playlist": (playlist, "not one of the accepted formats"),
    "m3u8": (m3u8, "no video container"),
    "missing": (lambda path: None, "cannot open the file: No such file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_refused_with_a_reason(tmp_path, name):
    make, reason = BAD[name]
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(MediaError, match=reason) as caught:
        sparse_frames(path)
    # Found on opening, except for a stream that turns out to be empty.
    assert isinstance(caught.value, UnreadableError) == (name != "header only")


def test_probing_reads_the_header(tmp_path):
    info = probe_video(write_video(tmp_path / "a.mp4", constant_rate(20, 10)))
    assert (info.width, info.height, info.codec, info.num_frames) == (64, 48, "h264", 20)
    assert info.duration_s == pytest.approx(2.0, abs=0.1)
