"""A folder of videos as shards, and a stream over them: what the benchmarks of the input side read."""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from alpro_stream.errors import AlproError, MediaError
from alpro_stream.manifest.options import ManifestConfig
from alpro_stream.manifest.reader import read_manifest
from alpro_stream.manifest.rows import ManifestRow
from alpro_stream.media.container import open_video
from alpro_stream.media.options import FrameConfig, VideoConfig
from alpro_stream.media.video import stored_video
from alpro_stream.stream.clips import FramesClip, build_clip_decoder
from alpro_stream.stream.config import StreamConfig, make_plan
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker, Sample
from alpro_stream.stream.plan import Plan
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import Tokenizer
from benchmarks.harness import save

EXAMPLES = Path("examples/clips/videos")
BATCH, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE = 16, 4, 224, 16

_HOME = Path("runs/bench/corpus")
_MIN_SAMPLES = 208
_SAMPLES_PER_SHARD = 26
_FOREVER = 1_000_000
_MANIFESTS = ("manifest.jsonl", "captions.jsonl")
_HINT = "; run this in the folder of a checkout, or give --clips a folder of videos"


@dataclass(frozen=True, slots=True)
class Video:
    """One that is measured on; as displayed."""

    name: str
    width: int
    height: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Corpus:
    """The videos of a folder that all can read.

    Attributes:
        folder: where they lie.
        home: where all that is made of them is kept; no other set's.
        videos: those that are measured on.
        num_left_out: other files of the folder.
    """

    folder: Path
    home: Path
    videos: tuple[Video, ...]
    num_left_out: int

    def content(self) -> dict[str, Any]:
        """What the results say of it."""
        median = sorted(self.videos, key=lambda video: video.width * video.height)[len(self.videos) // 2]
        durations = [video.duration_s for video in self.videos]
        return {
            "clips": len(self.videos),
            "median_size": f"{median.width}x{median.height}",
            "median_duration_s": round(statistics.median(durations), 3),
            "total_s": round(sum(durations), 3),
            "left_out": self.num_left_out,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which videos are measured on."""
    parser.add_argument(
        "--clips",
        type=Path,
        default=EXAMPLES,
        metavar="FOLDER",
        help="measure on its H.264 videos (default: %(default)s)",
    )


def content(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured on, by the arguments."""
    return open_corpus(arguments.clips).content()


def open_corpus(folder: Path) -> Corpus:
    """The videos of a folder; looked through once, which says of each file that is left out why.

    Left out is what is not H.264, what web corpora are made of and what all peers read, and what does not decode to
    its end.

    Args:
        folder: of videos; those in folders below are not looked at.

    Raises:
        AlproError: no such folder, or nothing in it can be measured on.
    """
    if not folder.is_dir():
        raise AlproError(f"{folder} is no folder of videos" + _HINT)
    home = _home(folder)
    noted = home / "clips.json"
    if not noted.is_file():
        save(noted, _look_through(folder))
    found = json.loads(noted.read_text(encoding="utf-8"))
    videos = tuple(Video(**values) for values in found["videos"])
    if not videos:
        raise AlproError(f"{folder} holds no H.264 video that all can read" + _HINT)
    return Corpus(folder, home, videos, len(found["left_out"]))


def make_shards(corpus: Corpus, payload: str = "frames") -> Path:
    """The folder of shards of a corpus; made by `alpro shard`, each clip several times, unless it is there.

    Args:
        corpus: its videos.
        payload: what the shards hold, frames or whole videos.

    Raises:
        AlproError: they could not be sharded.
    """
    out = corpus.home / payload
    if (out / "train" / "dataset.json").is_file():
        return out
    manifest = corpus.home / "manifest.jsonl"
    captions = _captions(corpus.folder)
    rows = (
        {
            "id": f"clip{number}",
            "media": str((corpus.folder / video.name).resolve()),
            "captions": captions.get(video.name, [Path(video.name).stem]),
            "split": "train",
            "kind": "video",
        }
        for number, video in enumerate(islice(cycle(corpus.videos), max(_MIN_SAMPLES, len(corpus.videos))))
    )
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = {
        "manifest": manifest,
        "work_dir": corpus.home / "work",
        "out": out,
        "payload": payload,
        "samples_per_shard": _SAMPLES_PER_SHARD,
        "wordpiece.vocab_size": 1200,
    }
    command = [sys.executable, "-m", "alpro_launch.cli", "shard", "configs/shard/default.yaml"]
    done = subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], capture_output=True)
    if done.returncode:
        raise AlproError(f"the clips could not be sharded:\n{done.stderr.decode(errors='replace')[-2000:]}")
    return out


@contextmanager
def open_stream(shards: Path, **options: Any) -> Iterator[tuple[BatchMaker, Plan]]:
    """A maker of batches of the benchmarks' size and its plan.

    Args:
        shards: of `make_shards`.
        options: of the stream's configuration.
    """
    values = {
        "sources": [{"path": str(shards / "train")}],
        "global_batch": BATCH,
        "num_lanes": 8,
        "text": {"tokenizer": str(shards / "tokenizer"), "num_tokens": 30},
        **options,
    }
    config = StreamConfig.model_validate(values)
    sources = open_sources(config.sources, config.unit)
    tokenizer = Tokenizer(config.text.tokenizer, config.text.num_tokens)
    decoder = build_clip_decoder(config.decode, IMAGE_SIZE, BATCH * NUM_FRAMES, None)
    maker = BatchMaker(config, sources, tokenizer, decoder, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE)
    try:
        yield maker, make_plan(config, sources)
    finally:
        maker.close()


def open_loader(maker: BatchMaker, plan: Plan) -> Loader:
    """One rank's batches, without an end."""
    return Loader(maker, plan, rank=0, world_size=1, first_step=0, last_step=_FOREVER)


def stored_frames(maker: BatchMaker, plan: Plan) -> list[bytes]:
    """Stored frames as the steps of a pass take them, clip by clip."""
    batches = (maker.read(plan, step, range(plan.num_lanes)) for step in range(plan.steps_per_epoch))
    clips = [sample.clip for batch in batches for sample in batch.samples if isinstance(sample, Sample)]
    return [clip.jpegs[number] for clip in clips if isinstance(clip, FramesClip) for number in clip.positions]


def decode_raw(jpegs: Sequence[bytes], num_threads: int = 2) -> int:
    """Nothing but libjpeg-turbo in threads, each into a buffer of its own; gives the number of clips.

    Args:
        jpegs: of `stored_frames`.
        num_threads: that decode.
    """

    def work(shared: Iterator[bytes]) -> None:
        buffer = np.empty((256, 256, 3), np.uint8)
        for jpeg in shared:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=buffer)

    with ThreadPoolExecutor(num_threads) as threads:
        shared = iter(jpegs)
        for done in [threads.submit(work, shared) for _ in range(num_threads)]:
            done.result()
    return len(jpegs) // NUM_FRAMES


def _home(folder: Path) -> Path:
    """By where a folder lies and what it holds, so that nothing is taken that was made of anything else."""
    if folder.resolve() == EXAMPLES.resolve():
        return _HOME.resolve()
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder)]
    digest = hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:12]
    return _HOME.with_name(f"{_HOME.name}-{digest}").resolve()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _look_through(folder: Path) -> dict[str, Any]:
    """The videos of a folder, and by name why other files are left out."""
    paths = [path for path in _files(folder) if path.name not in _MANIFESTS]
    with ThreadPoolExecutor() as threads:
        found = dict(zip(paths, threads.map(_look_at, paths), strict=True))
    left_out = {path.name: reason for path, reason in found.items() if isinstance(reason, str)}
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return {"videos": [asdict(each) for each in found.values() if isinstance(each, Video)], "left_out": left_out}


def _look_at(path: Path) -> Video | str:
    """A video as `alpro shard` sees it once all of it is decoded, or why it is left out."""
    max_pixels = FrameConfig().max_pixels
    try:
        with path.open("rb") as file:
            with open_video(file, max_pixels) as (_, stream):
                codec = stream.codec_context.codec.canonical_name
            if codec != "h264":
                return f"its codec is {codec}, and h264 is what all read"
            source = stored_video(file, VideoConfig(), max_pixels).source
    except (MediaError, OSError) as error:
        return str(error)
    if source.num_frames < NUM_FRAMES:
        return f"{source.num_frames} frames, fewer than the {NUM_FRAMES} of a clip"
    return Video(path.name, source.width, source.height, source.duration_s or 0.0)


def _captions(folder: Path) -> dict[str, list[str]]:
    """Captions by the name of the file, out of a manifest in the folder or beside it."""
    manifests = (place / name for place in (folder, folder.resolve().parent) for name in _MANIFESTS)
    manifest = next((path for path in manifests if path.is_file()), None)
    if manifest is None:
        return {}
    config = ManifestConfig(columns={"id": ["id", "video_id"], "media": ["media", "path"]})
    rows = read_manifest(manifest, config)
    return {Path(row.media).name: list(row.captions) for row in rows if isinstance(row, ManifestRow) and row.captions}
