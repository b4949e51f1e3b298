import os
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import (
    constant_rate,
    cut_by_edit_list,
    index_of,
    peak_memory_mb,
    write_audio,
    write_flat,
    write_image,
    write_video,
)

from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, MediaError
from alpro_stream.media import FrameConfig, UnreadableError, frames, open_media, sparse_frames, timeline
from alpro_stream.media.decode import Clip

CLIPS = sorted(Path(__file__, "../../../examples/clips/videos").resolve().iterdir())


def clip_of(path, *, start_s=None, end_s=None, **options):
    with open_media(path) as file:
        return sparse_frames(file, FrameConfig(**options), start_s=start_s, end_s=end_s)


def decoded_in_full(path, *, start_s=None, end_s=None, **options):
    with open_media(path) as file:
        return frames._decode_all(file, FrameConfig(**options), Clip.of(start_s, end_s))


def assert_same(some, all_):
    assert some.timestamps_s == all_.timestamps_s
    assert some.source == all_.source
    for one, other in zip(some.frames, all_.frames, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def quick_only(monkeypatch):
    """Whether a clip is decoded the quick way: falling back to decoding everything fails."""

    def refuse(*_):
        raise AssertionError("fell back to decoding everything")

    full = frames._decode_all
    monkeypatch.setattr(frames, "_decode_all", refuse)
    return full


def indices(clip):
    return [index_of(frame) for frame in clip.frames]


def test_frames_on_display_at_the_grid_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 25))
    clip = clip_of(path, fps=3, size=32)
    # 0, 1/3, 2/3, 1, 4/3, 5/3 s at 25 frames a second
    assert indices(clip) == [0, 8, 16, 25, 33, 41]
    assert clip.timestamps_s == (0.0, 0.32, 0.64, 1.0, 1.32, 1.64)
    assert all(frame.shape == (32, 32, 3) and frame.dtype == np.uint8 for frame in clip.frames)
    assert (clip.source.width, clip.source.height, clip.source.codec) == (64, 48, "h264")
    assert clip.source.num_frames == 50
    assert clip.source.duration_s == pytest.approx(2.0, abs=0.02)


def test_variable_rate_stores_a_long_shown_frame_once(tmp_path):
    path = write_video(tmp_path / "vfr.mkv", [0, 100, 200, 2000, 2100, 3500, 3540])
    clip = clip_of(path, fps=1)
    # Frame 2 is on display at 1 s, frame 3 at 2 s, frame 4 at 3 s; frames 1, 5 and 6 never at a grid time.
    assert indices(clip) == [0, 2, 3, 4]
    assert clip.timestamps_s == (0.0, 0.2, 2.0, 2.1)


def test_a_slow_video_stores_each_frame_once(tmp_path):
    path = write_video(tmp_path / "slow.mp4", [0, 4000, 8000])
    assert indices(clip_of(path, fps=3)) == [0, 1, 2]


def test_a_file_that_does_not_start_at_zero(tmp_path):
    path = write_video(tmp_path / "late.mkv", [5000 + t for t in constant_rate(20, 10)])
    clip = clip_of(path, fps=1)
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
    assert indices(clip_of(path, fps=5)) == [0, 5, 10, 15, 20, 25]


def test_a_long_clip_is_spread_over_its_whole_length(tmp_path):
    path = write_video(tmp_path / "long.mp4", constant_rate(60, 5))
    assert indices(clip_of(path, fps=5, max_frames=4)) == [0, 16, 40, 56]
    assert len(clip_of(path, fps=5, max_frames=59).frames) == 59
    assert indices(clip_of(path, fps=5, max_frames=60)) == list(range(60))


def test_start_and_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 10))
    clip = clip_of(path, fps=2, start_s=1.25, end_s=2.5)
    # on display at 1.25, 1.75 and 2.25 s
    assert indices(clip) == [12, 17, 22]
    assert clip.timestamps_s == (1.2, 1.7, 2.2)
    assert (clip.source.num_frames, clip.source.duration_s) == (13, 1.25)


def test_a_clip_late_in_the_file_is_the_same_with_and_without_seeking(tmp_path, monkeypatch):
    # A key frame every 10 frames: seeking to 9.0 s lands at frame 40.
    path = write_video(tmp_path / "a.mp4", constant_rate(55, 5))
    found = []
    for least in (5, 10**6):
        for module in ("decode", "timeline"):
            monkeypatch.setattr(f"alpro_stream.media.{module}.MIN_SEEK_S", Fraction(least))
        found += [clip_of(path, fps=2, start_s=9.0), decoded_in_full(path, fps=2, start_s=9.0)]
    assert indices(found[0]) == [45, 47, 50, 52]
    for other in found[1:]:
        assert_same(found[0], other)


def test_a_part_starts_where_the_manifest_says_in_decimals(tmp_path):
    # 0.6 is less than six tenths in binary, where frame 14 would still be on display.
    path = write_video(tmp_path / "a.mp4", constant_rate(25, 25))
    assert indices(clip_of(path, start_s=0.6, end_s=0.64)) == [15]


def test_a_start_after_the_end_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(10, 10))
    with pytest.raises(MediaError, match=r"no frame after the clip's start at 7 s: the video ends at 1 s"):
        clip_of(path, start_s=7.0)


def test_one_frame(tmp_path):
    clip = clip_of(write_video(tmp_path / "one.mp4", [0]))
    assert (indices(clip), clip.timestamps_s, clip.source.num_frames) == ([0], (0.0,), 1)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path, degrees):
    # Left half red, right half blue; the matrix of the MP4 track header is patched in.
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32, 0] = picture[:, 32:, 2] = 255
    path = write_video(tmp_path / "a.mp4", [0, 100], pixels=[picture, picture])
    _patch_rotation(path, degrees)
    clip = clip_of(path, size=32)
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


def test_decoding_twice_gives_the_same_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 90, 126, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", constant_rate(12, 6), width=126, height=90, pixels=noise)
    first, second = clip_of(path), clip_of(path)
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, second.frames, strict=True))


def test_damage_in_the_middle_is_refused_with_the_number_of_frames(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", constant_rate(40, 10), codec="libx264", width=128, height=96, pixels=noise)
    data = bytearray(path.read_bytes())
    start, end = int(len(data) * 0.4), int(len(data) * 0.6)
    data[start:end] = np.random.default_rng(1).bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"decoding failed after \d+ frames"):
        clip_of(path)


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
        clip_of(path)
    # Found on opening, except for a stream that turns out to be empty.
    assert isinstance(caught.value, UnreadableError) == (name != "header only")


def open_gop(path):
    """Frames before a key frame in display refer to it and to the group before."""
    params = {"x264-params": "open-gop=1:keyint=10:bframes=3:b-pyramid=strict:scenecut=0", "preset": "fast"}
    pictures = np.random.default_rng(3).integers(0, 255, (60, 48, 64, 3), np.uint8)
    return write_video(path, constant_rate(60, 12), pixels=pictures, options=params)


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_real_clips_give_the_same_as_decoding_everything(path):
    options = ({"fps": 3}, {"fps": 12, "max_frames": 5, "size": 64, "resize": "short_side"})[CLIPS.index(path) % 2]
    assert_same(clip_of(path, **options), decoded_in_full(path, **options))


@pytest.mark.parametrize(
    ("fps", "bounds"), list(product([1, 3, 7.5], [(None, None), (0.7, 2.3), (0.0, 0.1), (1.96, None), (6.2, 8.05)]))
)
@pytest.mark.parametrize("kind", ["two B-frames", "open groups", "irregular times", "mpeg4"])
def test_parts_of_clips_give_the_same_as_decoding_everything(tmp_path, quick_only, kind, fps, bounds):
    path = tmp_path / "a.mkv"
    if kind == "open groups":
        open_gop(path)
        bounds = tuple(None if bound is None else bound / 2 for bound in bounds)
    elif kind == "irregular times":
        write_video(path, [i * i + 160 * i for i in range(50)])
    elif kind == "mpeg4":
        write_video(path.with_suffix(".mp4"), constant_rate(60, 6), codec="mpeg4").rename(path)
    else:
        write_video(path, constant_rate(60, 6))
    given = {"fps": fps, "size": 48, "start_s": bounds[0], "end_s": bounds[1]}
    found = clip_of(path, **given)
    with open_media(path) as file:
        assert_same(found, quick_only(file, FrameConfig(fps=fps, size=48), Clip.of(*bounds)))
    assert found.sampling == "exact"


def test_an_edit_list_cuts_off_frames(tmp_path, quick_only):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 10))
    with av.open(str(path)) as container:
        ticks = Fraction(13, 10) / container.streams.video[0].time_base
    cut_by_edit_list(path, int(ticks))
    clip = clip_of(path, fps=2)
    # Frame 13 is the first; those before it, from the key frame at 10, are decoded and not displayed.
    assert (indices(clip), clip.timestamps_s) == ([13, 18, 23, 28, 33, 38, 43, 48], tuple(i / 2 for i in range(8)))
    assert clip.source.num_frames == 37


def test_frames_nobody_uses_are_not_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (27, 48, 64, 3), np.uint8)
    path = write_video(tmp_path / "a.mkv", constant_rate(27, 10), pixels=noise)
    before = clip_of(path, fps=1)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        referred = {frame.pts for frame in container.decode(video=0)}
    with av.open(str(path)) as container:
        packets = [(bytes(packet), packet.pts) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    unreferred = [packet for packet, pts in packets if pts not in referred and pts % 1000]
    after_the_last = [packet for packet, pts in packets if pts > 2300]
    assert len(unreferred) >= 6
    assert len(after_the_last) >= 2
    for packet in unreferred:
        start = data.index(packet) + 5  # behind the length and the type of the slice: its header becomes nonsense
        data[start : start + 8] = bytes(8)
    for packet in after_the_last:
        start = data.index(packet[16:]) - 16
        data[start : start + 4] = b"\xff" * 4  # its length
    path.write_bytes(data)
    assert_same(clip_of(path, fps=1), before)
    with pytest.raises(MediaError, match="decoding failed"):
        decoded_in_full(path, fps=1)


def test_hidden_frames_are_not_counted(tmp_path, quick_only):
    plain = write_video(tmp_path / "plain.mkv", constant_rate(40, 10), codec="libvpx")
    path = tmp_path / "hidden.mkv"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if packet.size and index % 4 == 1:
                data = bytearray(packet)
                data[0] &= ~0x10  # the bit that says that a frame is displayed
                hidden = av.Packet(bytes(data))
                hidden.pts = hidden.dts = packet.pts - 10
                hidden.time_base, hidden.stream = packet.time_base, stream
                target.mux(hidden)
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 50
    clip = clip_of(path, fps=4)
    assert clip.source.num_frames == 40
    with open_media(path) as file:
        assert_same(clip, quick_only(file, FrameConfig(fps=4), Clip.of(None, None)))


@pytest.mark.parametrize(
    ("bits", "hidden"),
    [
        # marker 10, profile low bit, high bit, shown again, kind, shown
        ("10 00 0 0 1 0", False),
        ("10 00 0 1 1 0", False),
        ("10 00 0 1 0 1", True),
        ("10 10 0 1 0 1", True),
        ("10 00 1 0 0 1", False),
        # profile 3 has a bit of no meaning before them
        ("10 11 0 0 1 1", False),
        ("10 11 0 0 1 0", True),
        ("10 11 0 1 0 0", False),
    ],
)
def test_vp9_says_in_its_first_byte_what_is_hidden(bits, hidden):
    first = int(bits.replace(" ", ""), 2)
    assert timeline._is_hidden("vp9", bytes([first, 0, 0])) is hidden
    assert not timeline._is_hidden("vp9", bytes([first, 0, 0xC1])), "a superframe holds a displayed frame"


def test_of_equal_times_the_first_frame_is_displayed(tmp_path):
    path = next(clip for clip in CLIPS if clip.name == "v020.mkv")
    twice = tmp_path / "twice.mkv"
    with av.open(str(path)) as source, av.open(str(twice), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = packet.pts // 200 * 200
                target.mux(packet)
    clip = clip_of(twice, fps=1000)
    assert_same(clip, decoded_in_full(twice, fps=1000))
    assert len(clip.frames) == clip.source.num_frames == 30


KEYS = {"sampling": "keyframes", "size": 64}


def test_keyframes_treats_the_clip_as_one_of_key_frames(tmp_path, quick_only):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 25))  # key frames every 0.4 s
    clip = clip_of(path, **KEYS)
    assert (indices(clip), clip.sampling) == ([0, 10, 20, 30, 40], "keyframes")
    assert clip.timestamps_s == (0.0, 0.4, 0.8, 1.2, 1.6)
    assert (clip.source.num_frames, clip.source.duration_s) == (50, 2.0)
    assert indices(clip_of(path, **KEYS, fps=1)) == [0, 20]  # on display at 0 and 1 s
    assert len(clip_of(path, **KEYS, max_frames=3).frames) == 3
    # The first key frame of the part is at 0.8 s.
    assert indices(clip_of(path, **KEYS, start_s=0.6, end_s=1.7, min_frames=1)) == [20, 30, 40]


def test_few_key_frames_fall_back_to_exact_sampling(tmp_path):
    path = write_video(tmp_path / "a.mp4", constant_rate(50, 25))
    clip = clip_of(path, **KEYS, min_frames=6)
    assert (clip.sampling, indices(clip)) == ("exact", [0, 8, 16, 25, 33, 41])
    one = clip_of(write_video(tmp_path / "one.mp4", [0]), **KEYS)  # there are no more frames
    assert (one.sampling, indices(one)) == ("keyframes", [0])


@pytest.mark.parametrize("path", [None, *CLIPS[::3]], ids=lambda path: path.name if path else "open groups")
def test_key_frames_look_as_when_everything_is_decoded(tmp_path, path):
    path = path or open_gop(tmp_path / "a.mp4")
    found = clip_of(path, **KEYS, min_frames=1, fps=1000)
    every = decoded_in_full(path, size=64, fps=1000, max_frames=1000)
    for time, frame in zip(found.timestamps_s, found.frames, strict=True):
        np.testing.assert_array_equal(frame, every.frames[every.timestamps_s.index(time)])
    assert found.source == every.source


def test_short_side_keeps_the_aspect_ratio_that_is_displayed(tmp_path):
    wide = write_video(tmp_path / "a.mp4", [0], width=90, height=60)
    assert clip_of(wide, size=40, resize="short_side").frames[0].shape == (40, 60, 3)
    _patch_rotation(wide, 90)
    assert clip_of(wide, size=40, resize="short_side").frames[0].shape == (60, 40, 3)
    anamorphic = write_flat(tmp_path / "b.mp4", (100, 128, 128), sample_aspect_ratio=Fraction(2), size=(60, 60))
    assert clip_of(anamorphic, size=40, resize="short_side").frames[0].shape == (40, 80, 3)
    strip = write_flat(tmp_path / "c.mp4", (100, 128, 128), size=(640, 16))
    with pytest.raises(MediaError, match=r"40 times as wide as high; resize=short_side takes up to 8 to 1"):
        clip_of(strip, resize="short_side")


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 100])
    with pytest.raises(UnreadableError, match=r"the video has 64 x 48 pixels, more than the limit of 3000"):
        clip_of(path, max_pixels=3000)
    assert len(clip_of(path, max_pixels=64 * 48).frames) == 1


def test_a_size_that_grows_in_the_middle_of_a_file_is_refused(tmp_path):
    small = write_flat(tmp_path / "a.ts", (100, 128, 128), size=(64, 64), num_frames=100)
    large = write_flat(tmp_path / "b.ts", (100, 128, 128), size=(1024, 1024), num_frames=3)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    # Its times start anew in the middle.
    assert_same(clip_of(both, fps=30), decoded_in_full(both, fps=30))
    with pytest.raises(MediaError, match="decoding failed after 100 frames"):
        clip_of(both, fps=30, max_pixels=64 * 64)


def test_an_8k_clip_needs_little_memory(tmp_path):
    options = {"preset": "ultrafast"}
    path = write_flat(tmp_path / "a.mp4", (100, 128, 128), size=(7680, 4320), num_frames=3, options=options)
    assert peak_memory_mb("sparse_frames(file, FrameConfig(fps=10))", path) < 500


def test_an_end_before_the_start_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 100])
    with pytest.raises(MediaError, match=r"the clip ends at 1 s and starts at 2 s; the end must be later"):
        clip_of(path, start_s=2.0, end_s=1.0)


@pytest.mark.parametrize(
    ("key", "value"), [("fps", 0), ("max_frames", 1001), ("quality", 96), ("chroma", "422"), ("resize", "crop")]
)
def test_options_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"frames: '{key}'"):
        validate(FrameConfig, {key: value}, "frames")
