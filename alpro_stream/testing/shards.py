"""Small shard sets made of coloured pictures, without FFmpeg or Ray."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alpro_stream.manifest import Kind
from alpro_stream.shards.entities import save_entities
from alpro_stream.shards.layout import ENTITIES_FILE, DatasetInfo, ShardInfo, save_dataset_info
from alpro_stream.shards.sample import Sample, SampleMetadata
from alpro_stream.shards.writer import ShardWriter

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 200), "yellow": (210, 200, 40)}
NOUNS = ("dog", "cat", "car", "tree", "boat", "house", "bird", "cup")
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def caption_of(number: int) -> str:
    """The caption of sample `number`: 32 different ones, then they repeat."""
    colour = list(COLOURS)[number % len(COLOURS)]
    return f"a {colour} {NOUNS[number // len(COLOURS) % len(NOUNS)]} moves"


def picture(number: int, frame: int, size: int) -> bytes:
    """A JPEG of a coloured square whose place depends on the noun and the frame."""
    pixels = np.full((size, size, 3), 90, np.uint8)
    side = size // 3
    place = (number // len(COLOURS)) % len(NOUNS)
    left, top = place % 3 * side, (place // 3 * side + 2 * frame) % (size - side)
    pixels[top : top + side, left : left + side] = list(COLOURS.values())[number % len(COLOURS)]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample(number: int, kind: Kind, num_frames: int, size: int) -> Sample:
    """A sample with id ``<kind>-<number>``."""
    key = f"{kind}-{number:05d}"
    metadata = SampleMetadata(
        key=key,
        id=key,
        captions=(caption_of(number),),
        qa=(),
        kind=kind,
        frame_timestamps_s=tuple(frame / 3 for frame in range(num_frames)),
        source={"media": f"{key}.mp4"},
    )
    return Sample(metadata, tuple(picture(number, frame, size) for frame in range(num_frames)))


def write_dataset(
    directory: Path,
    *,
    video_shards: Sequence[int],
    image_shards: Sequence[int] = (),
    num_frames: int = 6,
    size: int = 32,
) -> DatasetInfo:
    """Writes a data set whose shards hold the given numbers of samples, with its entities."""
    directory.mkdir(parents=True, exist_ok=True)
    infos: list[ShardInfo] = []
    kinds: tuple[tuple[Kind, Sequence[int], int], ...] = (
        ("video", video_shards, num_frames),
        ("image", image_shards, 1),
    )
    for kind, sizes, frames in kinds:
        first = 0
        for shard, count in enumerate(sizes):
            with ShardWriter(directory, f"{kind}-{shard:06d}", kind) as writer:
                for number in range(first, first + count):
                    writer.add(sample(number, kind, frames, size))
                infos.append(writer.close())
            first += count
    info = DatasetInfo.of_shards(directory.name, {"payload": "frames", "frames": {"size": size}}, infos)
    save_dataset_info(directory, info)
    save_entities(directory / ENTITIES_FILE, [(noun, 4) for noun in NOUNS])
    return info


def write_tokenizer(directory: Path) -> Path:
    """A BERT tokenizer that knows the words of the captions and of the prompts."""
    words = {word for number in range(32) for word in caption_of(number).split()}
    words |= set(["a", "the", "one", "footage", "of", "video", "portrait", "photo", "picture", "good", ".", "image"])
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = "\n".join((*_SPECIAL_TOKENS, *sorted(words))) + "\n"
    (directory / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}), encoding="utf-8"
    )
    return directory
