"""Videos to WebDataset tars by plain Ray Data, as its users would write it: decode in a map, `write_webdataset`.

``python benchmarks/peers/ray_data_tars.py VIDEOS OUT [--cores N]``: makes the tars of all videos of a folder for each
line that it reads, and answers with the number of samples and frames. Frames on a grid of 3 a second, 256x256, as JPEG
of quality 90, with a caption: what the sharding that it is compared with stores.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import simplejpeg
from torchcodec.decoders import VideoDecoder
from torchvision.transforms.v2 import InterpolationMode, functional

RATE, SIDE, QUALITY = 3, 256, 90
CAPTION = "a man walks a dog along the beach"


def decode(row: dict[str, Any]) -> dict[str, Any]:
    """A sample: one column a frame, as `write_webdataset` makes a member of each."""
    # One thread a task: Ray runs as many tasks as there are cores.
    video = VideoDecoder(row["path"], num_ffmpeg_threads=1)
    start, end = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds
    frames = video.get_frames_played_at(list(np.arange(start, end, 1 / RATE))).data
    frames = functional.resize(frames, [SIDE, SIDE], InterpolationMode.BICUBIC).permute(0, 2, 3, 1).contiguous()
    sample: dict[str, Any] = {"__key__": Path(row["path"]).stem, "txt": CAPTION}
    for number, frame in enumerate(frames.numpy()):
        sample[f"{number:03d}.jpg"] = simplejpeg.encode_jpeg(frame, quality=QUALITY)
    return sample


def write(videos: list[Path], out: Path) -> dict[str, int]:
    """Makes the tars anew; says how much is in them."""
    shutil.rmtree(out, ignore_errors=True)
    # A block a video: whole tasks for every core, also of few videos.
    rows = ray.data.from_items([{"path": str(path)} for path in videos], override_num_blocks=len(videos))
    # The encoder would take bytes for pixels.
    rows.map(decode).write_webdataset(str(out), encoder=None)
    return {"num_tars": len(list(out.glob("*.tar"))), "num_bytes": sum(path.stat().st_size for path in out.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    # Libraries print to the standard output; it is for the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ray.init(num_cpus=arguments.cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    videos = sorted(arguments.videos.iterdir())
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(write(videos, arguments.out)), file=answers, flush=True)


if __name__ == "__main__":
    main()
