"""Makes the clips of these tests and, by the ffmpeg command, what each frame of them looks like.

    python tests/reference/make_references.py [FOLDER WITH DAMAGED FILES]

writes beside itself ``clips/*`` (frames that show their own number, see `picture`), ``frames/*.png`` (frames as the
ffmpeg command decodes and scales them, one above the other) and ``references.json`` (when each frame is displayed, and
which frames are in the picture). With a folder it also copies the damaged files that `DAMAGED` names; of those that
decode it makes references in any case.

Made with ffmpeg 5.1 (libavcodec 59); the tests run with whatever FFmpeg PyAV brings, another version in another build.
Another ffmpeg makes other bytes of the same frames.
"""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).parent
NUM_FRAMES, RATE, WIDTH, HEIGHT = 24, 12, 64, 48
NUM_BITS = 5
SIDE = 24
"""Side of the reference frames."""
SCALER = "flags=bicubic+full_chroma_int+accurate_rnd+bitexact"

X264 = "-c:v libx264 -preset medium -crf 18"
X265 = "-c:v libx265 -preset medium -crf 18"
AV1 = "-c:v libaom-av1 -cpu-used 6 -crf 20 -b:v 0 -g 12 -lag-in-frames 12"
VP9 = "-c:v libvpx-vp9 -crf 16 -b:v 0 -g 12 -lag-in-frames 12 -auto-alt-ref 1"
IRREGULAR = "-vf settb=1/1000,setpts=N*N*9+N*40 -fps_mode passthrough -enc_time_base 1/1000"

CLIPS = {
    "h264_closed_gop.mp4": f"{X264} -bf 0 -g 8 -pix_fmt yuv420p",
    "h264_b_frames.mp4": f"{X264} -bf 3 -b_strategy 0 -g 16 -x264-params b-pyramid=normal -pix_fmt yuv420p",
    "h264_open_gop.mkv": f"{X264} -x264-params open-gop=1:keyint=8:bframes=3:b-adapt=0:scenecut=0 -pix_fmt yuv420p",
    "h264_one_key_frame.mp4": f"{X264} -bf 2 -g 250 -pix_fmt yuv420p",
    "h264_10_bit.mp4": f"{X264} -profile:v high10 -g 8 -pix_fmt yuv420p10le",
    "h264_444.mp4": f"{X264} -g 8 -pix_fmt yuv444p",
    "h264_full_range_bt709.mp4": f"{X264} -g 8 -pix_fmt yuv420p -colorspace bt709 -color_range pc "
    "-vf scale=out_color_matrix=bt709:out_range=pc",
    "h264_interlaced.mp4": f"{X264} -g 8 -flags +ildct+ilme -x264-params tff=1 -pix_fmt yuv420p",
    "h264_starts_late.ts": f"{X264} -bf 2 -g 8 -pix_fmt yuv420p",
    "h264_fragmented.mp4": f"{X264} -bf 2 -g 8 -pix_fmt yuv420p -movflags frag_keyframe+empty_moov",
    "h264_variable_rate.mp4": f"{IRREGULAR} {X264} -bf 2 -g 8 -pix_fmt yuv420p",
    "hevc_b_frames.mp4": f"{X265} -x265-params keyint=8:bframes=3:open-gop=0:log-level=none -pix_fmt yuv420p",
    "hevc_open_gop.mkv": f"{X265} -x265-params keyint=8:min-keyint=8:bframes=3:open-gop=1:scenecut=0:log-level=none "
    "-pix_fmt yuv420p",
    "hevc_temporal_layers.mp4": f"{X265} -x265-params temporal-layers=3:keyint=16:bframes=7:b-adapt=0:log-level=none "
    "-pix_fmt yuv420p",
    "hevc_10_bit.mp4": f"{X265} -x265-params keyint=8:log-level=none -pix_fmt yuv420p10le",
    "vp8.webm": "-c:v libvpx -crf 8 -b:v 1M -g 12 -lag-in-frames 12 -auto-alt-ref 1 -pix_fmt yuv420p",
    "vp8_variable_rate.webm": f"{IRREGULAR} -c:v libvpx -crf 8 -b:v 1M -g 12 -pix_fmt yuv420p",
    "vp9.webm": f"{VP9} -pix_fmt yuv420p",
    "vp9_10_bit.webm": f"{VP9} -profile:v 2 -pix_fmt yuv420p10le",
    "av1.mp4": f"{AV1} -pix_fmt yuv420p",
    "av1_10_bit.mkv": f"{AV1} -pix_fmt yuv420p10le",
    "mpeg4.mp4": "-c:v mpeg4 -q:v 3 -g 8 -bf 2 -pix_fmt yuv420p",
    "mpeg4_b_frames.avi": "-c:v mpeg4 -q:v 3 -g 8 -bf 2 -pix_fmt yuv420p",
    "huge_7680x4320.mp4": f"-frames:v 3 -vf scale=8:6:flags=area,scale=7680:4320:flags=neighbor {X264} "
    "-pix_fmt yuv420p -colorspace bt709",
    "odd_65x47.mp4": f"-vf scale=65:47:flags=neighbor {X264} -g 8 -pix_fmt yuv444p",
    "odd_321x179.webm": f"-vf scale=321:179 {VP9.replace('-crf 16', '-crf 40')} -pix_fmt yuv420p",
}
"""Options of the ffmpeg command for each clip made of pictures."""

REMUXED = {
    "rotated_90.mp4": ("h264_444.mp4", "-metadata:s:v rotate=90"),
    "rotated_180.mp4": ("h264_444.mp4", "-metadata:s:v rotate=180"),
    "rotated_270.mov": ("h264_444.mp4", "-metadata:s:v rotate=270"),
    "h264_edit_list.mp4": ("h264_b_frames.mp4", ""),
    "h264_truncated.mp4": ("h264_closed_gop.mp4", "-movflags +faststart"),
    "vp9_no_duration.webm": ("vp9.webm", "-live 1"),
}
"""Clips made of others, without encoding: the source and the options."""
SEEK_S = {"h264_edit_list.mp4": "0.4"}
TRUNCATED = {"h264_truncated.mp4": 14}
"""Frames that are left of a file with its index at the front."""

DAMAGED = (
    "audio_only.mp4",
    "corrupted_frames.mp4",
    "hdr_10bit_422_hevc.mp4",
    "image_renamed.mp4",
    "odd_size_321x179.webm",
    "one_frame.mp4",
    "one_pixel.png",
    "rotated_90_three_frames.mov",
    "text_renamed.mp4",
    "zero_bytes.mp4",
    "zero_duration_init_only.mp4",
    "cmyk_image.jpg",
    "truncated_image.jpg",
)
DECODABLE = frozenset(
    ("hdr_10bit_422_hevc.mp4", "odd_size_321x179.webm", "one_frame.mp4", "rotated_90_three_frames.mov")
)
"""Files that are odd and not damaged."""
CMYK = "cmyk_image.jpg"
CMYK_CORNER = (113, 140)
"""Left and top of the square of it that is kept."""


def picture(number):
    """Frame `number` of a clip: its binary digits in white and black at the top, a pattern that moves below."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    frame = np.stack(
        [
            128 + 100 * np.sin((columns + 2 * number) / 6),
            128 + 100 * np.sin((rows - 3 * number) / 5),
            40 + 4 * ((columns + rows + 5 * number) % 48),
        ],
        axis=-1,
    )
    right = (44 + 7 * number) % WIDTH
    frame[28:40, right : right + 8] = (250, 240, 20)
    for bit in range(NUM_BITS):
        left, end = (bit * WIDTH) // NUM_BITS, ((bit + 1) * WIDTH) // NUM_BITS
        frame[:16, left:end] = 235 if number >> bit & 1 else 20
    return np.clip(frame, 0, 255).astype(np.uint8)


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, **options).stdout


def ffmpeg(*arguments, **options):
    return run("ffmpeg", "-v", "error", "-nostdin", "-y", "-threads", "1", *arguments, **options)


def make_clips(folder):
    raw = b"".join(picture(number).tobytes() for number in range(NUM_FRAMES))
    shape = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", RATE)
    for name, options in CLIPS.items():
        ends = (*options.split(), "-fflags", "+bitexact", folder / name)
        run("ffmpeg", "-v", "error", "-y", *shape, "-i", "-", *ends, input=raw)
    for name, (source, options) in REMUXED.items():
        seek = ("-ss", SEEK_S[name]) if name in SEEK_S else ()
        ffmpeg(*seek, "-i", folder / source, "-c", "copy", *options.split(), folder / name)
        if name in TRUNCATED:
            cut = probe(folder / name, "-show_packets")["packets"][TRUNCATED[name]]
            os.truncate(folder / name, int(cut["pos"]))


def probe(path, *options):
    return json.loads(run("ffprobe", "-v", "error", "-select_streams", "v:0", *options, "-of", "json", path))


def write_png(path, pixels):
    cv2.imwrite(str(path), pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])  # OpenCV's order is BGR


def few_of(num_frames):
    """The first frame, the middles of four equal parts, and the last one."""
    return [0, *((2 * part + 1) * num_frames // 8 for part in range(4)), num_frames - 1]


def reference(path, frames_folder):
    """Writes the picture of a clip's frames, a few of them when it has many, and returns what is noted of it."""
    found = probe(path, "-show_streams", "-show_frames")
    # Shrunk 80 times, swscale of ffmpeg 5.1 forgets the matrix of the colours.
    side = 256 if "huge" in path.name else SIDE
    (info,), frames = found["streams"], found["frames"]
    if path.suffix == ".avi":  # states no times: its frames are shown at a constant rate
        times = [float(number / Fraction(info["avg_frame_rate"])) for number in range(len(frames))]
    else:
        times = [float(frame["best_effort_timestamp_time"]) for frame in frames]
    stored = list(range(len(times))) if len(times) <= NUM_FRAMES else few_of(len(times))
    is_hdr = info.get("color_transfer") == "smpte2084"
    # Where the file states no matrix, players take BT.709 for high definition; the ffmpeg command never does.
    is_hd = info["height"] > 576 or info["width"] > 1024
    matrix = ":in_color_matrix=bt709" if is_hd and info.get("color_space", "unknown") == "unknown" else ""
    # The decoders say where the samples of colour lie; this version of the command has to be told.
    is_left = info.get("chroma_location") == "left" and info["pix_fmt"].startswith(("yuv420", "yuvj420"))
    chroma = ":in_h_chr_pos=0" if is_left else ""
    # As newer versions do by themselves: each field of an interlaced frame is scaled on its own.
    is_interlaced = info.get("field_order", "unknown") not in ("unknown", "progressive")
    chroma += ":interl=1" if is_interlaced else ":in_v_chr_pos=128" if is_left else ""
    select = "+".join(f"eq(n,{number})" for number in stored)
    scale = f"scale={side}:{side}:{SCALER}{matrix}{chroma}"
    pixels = ffmpeg(
        "-i", path, "-map", "0:v:0", "-fps_mode", "passthrough", "-enc_time_base", "1/1000000",
        "-vf", f"select='{select}',{scale}", "-pix_fmt", "rgb48le" if is_hdr else "rgb24", "-f", "rawvideo", "-",
    )  # fmt: skip
    strip = np.frombuffer(pixels, np.uint16 if is_hdr else np.uint8).reshape(-1, side, 3)
    assert len(strip) == len(stored) * side, f"{path.name}: {len(strip) / side} frames, expected {len(stored)}"
    write_png(frames_folder / f"{path.name}.png", strip)
    turned = next((entry["rotation"] for entry in info.get("side_data_list", ()) if "rotation" in entry), 0)
    size = [info["width"], info["height"]]
    return {
        "codec": info["codec_name"],
        "pixel_format": info["pix_fmt"],
        "size": size if turned % 180 == 0 else size[::-1],
        "turned": turned,
        "times_s": [round(time - times[0], 6) for time in times],
        "stored": stored,
        "side": side,
    }


def main(damaged=None):
    folders = {name: HERE / name for name in ("clips", "frames", "damaged")}
    for name, folder in folders.items():
        if name != "damaged" or damaged:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    make_clips(folders["clips"])
    if damaged:
        for name in DAMAGED:
            shutil.copyfile(Path(damaged, name), folders["damaged"] / name)
    paths = sorted(folders["clips"].iterdir()) + sorted(folders["damaged"] / name for name in DECODABLE)
    found = {f"{path.parent.name}/{path.name}": reference(path, folders["frames"]) for path in paths}
    left, top = CMYK_CORNER
    pixels = ffmpeg(
        "-i", folders["damaged"] / CMYK, "-vf", f"crop={SIDE}:{SIDE}:{left}:{top}",
        "-pix_fmt", "rgb24", "-f", "rawvideo", "-",
    )  # fmt: skip
    write_png(folders["frames"] / f"{CMYK}.png", np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE, 3))
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items())
    HERE.joinpath("references.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
