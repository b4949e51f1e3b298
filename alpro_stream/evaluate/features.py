"""Every video and every text encoded once, split over the ranks.

Legend: C texts, V videos, K clips, R rows, E projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alpro_stream.errors import DataError
from alpro_stream.evaluate.aggregate import Aggregation, aggregate
from alpro_stream.evaluate.embed import StoredClip, TextEmbeddings, VideoEmbeddings, embed_texts, embed_videos
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.shards.storage import publish, temporary_beside
from alpro_stream.stream.clips import ClipDecoder
from alpro_stream.stream.isolated import FrameChoice
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.distributed import World

T = TypeVar("T")


@dataclass(frozen=True)
class Encoding:
    """How videos and captions are encoded.

    Attributes:
        choice: frames of a video, those of all its clips.
        decoder: of the size that the model takes.
        tokenizer: of the model.
        batch_size: clips or captions that are encoded at once.
        num_clips: of a video.
        num_tokens: length of a text; None as in training.
    """

    choice: FrameChoice
    decoder: ClipDecoder
    tokenizer: Tokenizer
    batch_size: int
    num_clips: int = 1
    num_tokens: int | None = None


@dataclass(frozen=True)
class Features:
    """What one rank has encoded: every n-th video and every n-th caption for n ranks."""

    videos: VideoEmbeddings
    texts: TextEmbeddings


def own_share(items: Sequence[T], world: World) -> list[T]:
    """Every n-th item for n ranks, as many on each of them: the last one again where there are too few."""
    length = -(-len(items) // world.size)
    return [items[min(number * world.size + world.rank, len(items) - 1)] for number in range(length)]


def of_all_ranks(own_R: Tensor, count: int, world: World) -> Tensor:
    """The rows that belong to `count` items, of all ranks in the order of the items; the inverse of `own_share`.

    Args:
        own_R: some rows for each item of this rank, as many for each.
        count: items of all ranks, without those that only filled up.
        world: the ranks.
    """
    if world.size == 1:
        return own_R
    num_items = -(-count // world.size)
    # A copy: what was computed in inference mode cannot be sent.
    gathered = world.gather(own_R.clone()).view(world.size, num_items, -1, *own_R.shape[1:])
    return gathered.transpose(0, 1).flatten(0, 1)[:count].flatten(0, 1)


def encode_share(
    encoder: DualEncoder, clips: Sequence[StoredClip], captions: Sequence[str], how: Encoding, world: World
) -> Features:
    """Encodes this rank's part of the videos and of the captions; waits for no other rank.

    Raises:
        SampleError: a video cannot be read or decoded.
    """
    own = own_share(clips, world)
    videos = embed_videos(encoder, own, how.choice, how.decoder, how.batch_size, how.num_clips)
    texts = embed_texts(encoder, own_share(captions, world), how.tokenizer, how.batch_size, how.num_tokens)
    return Features(videos, texts)


def similarities(
    features: Features,
    num_captions: int,
    num_videos: int,
    world: World,
    num_clips: int = 1,
    aggregation: Aggregation = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """VTC of every caption with every video, (C, V), on every rank; all ranks must ask.

    Args:
        features: of this rank.
        num_captions: C.
        num_videos: V.
        world: the ranks.
        num_clips: of a video.
        aggregation: of the similarities of its clips over the temperature, which are VTC's logits.
        temperature: of the model; one clip needs none.
    """
    feature_KE = of_all_ranks(features.videos.feature_VE, num_videos, world)
    feature_CE = of_all_ranks(features.texts.feature_CE, num_captions, world)
    scores_CK = feature_CE @ feature_KE.T
    if num_clips == 1:
        return scores_CK
    return aggregate(scores_CK.view(num_captions, num_videos, num_clips) / temperature, aggregation) * temperature


def save_features(features: Features, path: Path) -> None:
    """Writes what a rank has encoded, aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_beside(path)
    parts = {**vars(features.videos), **vars(features.texts)}
    try:
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, aside)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_features(path: Path, device: torch.device) -> Features:
    """Reads what `save_features` wrote.

    Raises:
        DataError: it is damaged.
    """
    try:
        parts = load_file(path, device=str(device))
        videos = VideoEmbeddings(parts.pop("tokens_VND"), parts.pop("feature_VE"))
        return Features(videos, TextEmbeddings(**parts))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it, it is made again") from error
