"""The example clips as shards, and a stream over them: what the benchmarks of the input side read."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg

from alpro_stream.errors import AlproError
from alpro_stream.stream.clips import FramesClip, build_clip_decoder
from alpro_stream.stream.config import StreamConfig, make_plan
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker, Sample
from alpro_stream.stream.plan import Plan
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import Tokenizer

EXAMPLES = Path("examples/clips")
BATCH, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE = 16, 4, 224, 16

_NUM_SAMPLES = 208
_SAMPLES_PER_SHARD = 26
_FOREVER = 1_000_000


def video_files() -> list[Path]:
    """The example clips in H.264, what web corpora are made of and what all peers read."""
    return [path for path in sorted((EXAMPLES / "videos").glob("*")) if _codec(path) == "h264"]


def make_shards(folder: Path, payload: str = "frames") -> Path:
    """The folder of shards in `folder`; made by `alpro shard`, each clip several times, unless it is there.

    Raises:
        AlproError: no example clips here, or they could not be sharded.
    """
    clips = video_files()
    if not clips:
        raise AlproError(f"no clips in {EXAMPLES}; run this in the folder of a checkout")
    out = folder / payload
    if (out / "train" / "dataset.json").is_file():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    captions = _captions()
    rows = (
        {
            "id": f"clip{number}",
            "media": str(clip.resolve()),
            "captions": captions[clip.stem],
            "split": "train",
            "kind": "video",
        }
        for number, clip in enumerate(islice(cycle(clips), _NUM_SAMPLES))
    )
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = {
        "manifest": manifest,
        "work_dir": folder / "work",
        "out": out,
        "payload": payload,
        "samples_per_shard": _SAMPLES_PER_SHARD,
        "wordpiece.vocab_size": 1200,
    }
    command = [sys.executable, "-m", "alpro_launch.cli", "shard", "configs/shard/default.yaml"]
    done = subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], capture_output=True)
    if done.returncode:
        raise AlproError(f"the example clips could not be sharded:\n{done.stderr.decode(errors='replace')[-2000:]}")
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


def _captions() -> dict[str, list[str]]:
    """Captions of the example clips, by the name of the file."""
    lines = (EXAMPLES / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {Path(row["media"]).stem: row["captions"] for row in map(json.loads, lines)}


def _codec(path: Path) -> str:
    with av.open(str(path)) as container:
        return str(container.streams.video[0].codec_context.name)
