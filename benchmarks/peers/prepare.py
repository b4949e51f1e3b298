"""Lays out the same clips for each peer: files, files at 3 frames a second, MDS shards, an Energon data set."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FPS = 3
"""Of the re-encoded files, as the ALPRO authors have them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample of the shards."""

    key: str
    media: str
    codec: str
    jpegs: list[bytes]


def stored_samples(tars: list[Path]) -> Iterator[Stored]:
    """The samples of shards in format 1: `<key>.json` comes first, then the frames in order."""
    for path in tars:
        frames: dict[str, list[bytes]] = {}
        sources: dict[str, dict] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                content = tar.extractfile(member).read()
                if ending == "json":
                    sources[key] = json.loads(content)["source"]
                elif ending.endswith("jpg"):
                    frames.setdefault(key, []).append(content)
        for key, jpegs in frames.items():
            yield Stored(key, sources[key]["media"], sources[key]["codec"], jpegs)


def empty(folder: Path) -> Path:
    """The folder's path, with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def reencode(source: Path, out: Path) -> None:
    """H.264 as x264 writes it by default; sides made even, as it asks for."""
    even = "scale=trunc(iw/2)*2:trunc(ih/2)*2"
    options = ["-r", str(FPS), "-vf", even, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-an"]
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", source, *options, out], check=True, stdin=subprocess.DEVNULL)


def prepare(source: Path, shards: Path, data: Path) -> None:
    """Makes the folder `data` that all peers read.

    Args:
        source: folder of the videos that the shards were made of; only those with H.264 are linked.
        shards: what `alpro shard` wrote, the folder in which `train` lies.
        data: the folder to make; what an earlier call put there is made anew.

    Raises:
        SystemExit: no shards of videos, no H.264 among them, or a video is not in `source`.
    """
    # The peers' libraries take seconds to import, and are not needed to print the help.
    import energon_tars
    import mosaic_shards

    tars = sorted((shards / "train").glob("video-*.tar"))
    if not tars:
        raise SystemExit(f"{shards / 'train'} has no video-*.tar; give the folder that `alpro shard` wrote to")
    data.mkdir(parents=True, exist_ok=True)
    if (data / "shards").resolve() != shards.resolve():
        (data / "shards").unlink(missing_ok=True)
        (data / "shards").symlink_to(shards.resolve())
    samples = list(stored_samples(tars))
    # Decord's FFmpeg is of 2018 and hangs on what it cannot read; H.264 is what the authors' corpus has.
    videos = {sample.key: source / Path(sample.media).name for sample in samples if sample.codec == "h264"}
    missing = [path.name for path in videos.values() if not path.is_file()]
    if missing or not videos:
        found = f"lacks {', '.join(missing[:3])}" if missing else "holds no H.264 video of the shards"
        raise SystemExit(f"{source} {found}; give the folder of the videos that {shards} was made of")
    for folder in ("videos", "videos_3fps"):
        empty(data / folder).mkdir()
    made: dict[Path, Path] = {}
    for key, path in videos.items():
        (data / "videos" / f"{key}{path.suffix}").symlink_to(path.resolve())
        out = data / "videos_3fps" / f"{key}.mp4"
        if (first := made.setdefault(path, out)) is out:
            reencode(path, out)
        else:
            out.hardlink_to(first)
    mosaic_shards.write(empty(data / "mds"), ((sample.key, sample.jpegs) for sample in samples))
    energon_tars.prepare(empty(data / "energon"), tars)
    print(f"{len(samples)} clips in shards, {len(videos)} of them as files")
