"""Embeddings of whole data sets. Legend: V videos, C captions, N video tokens, L text tokens, D width, E projection."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from alpro_stream.errors import DataError
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.decode import WHOLE_FRAME, FrameDecoder, FrameRequest
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.seeds import Draws
from alpro_stream.stream.sources import Source
from alpro_stream.stream.text import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class StoredClip:
    """Where a clip lies, and what is known of it."""

    source: Source
    shard: str
    slot: int
    key: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class VideoEmbeddings:
    """Every clip encoded once: tokens for the multimodal encoder, features for comparing."""

    tokens_VND: Tensor
    feature_VE: Tensor


@dataclass(frozen=True)
class TextEmbeddings:
    """Every caption encoded once."""

    text_CLD: Tensor
    mask_CL: Tensor
    feature_CE: Tensor


def stored_clips(sources: Sequence[Source]) -> list[StoredClip]:
    """All samples of the sources, in the order of their shards."""
    clips = []
    for source in sources:
        for shard in source.shards:
            for slot in range(shard.num_samples):
                metadata = source.reader.metadata(shard.name, slot)
                clips.append(StoredClip(source, shard.name, slot, metadata.key, metadata.captions))
    return clips


def read_clip(clip: StoredClip, num_frames: int, decoder: FrameDecoder) -> Tensor:
    """A clip as evaluation sees it: frames spread evenly, the whole frame resized, (T, H, W, 3) uint8.

    Raises:
        DataError: a stored frame cannot be decoded.
    """
    stored = clip.source.reader.frame_members(clip.shard, clip.slot)
    chosen = choose_frames(len(stored), num_frames, "uniform", Draws("evaluation"))
    distinct, positions = np.unique(chosen, return_inverse=True)
    jpegs = clip.source.reader.read(clip.shard, clip.slot, [stored[index] for index in distinct])
    try:
        frames = decoder.decode([FrameRequest(jpeg, WHOLE_FRAME, flip=False) for jpeg in jpegs])
    except ValueError as error:
        raise DataError(f"{clip.shard}:{clip.slot} {clip.key}: a stored frame cannot be decoded") from error
    return frames[torch.from_numpy(positions).to(frames.device)]


@torch.inference_mode()
def embed_videos(
    encoder: DualEncoder, clips: Sequence[StoredClip], decoder: FrameDecoder, batch_size: int
) -> VideoEmbeddings:
    """Encodes clips, `batch_size` at a time."""
    device = next(encoder.parameters()).device
    num_frames = encoder.config.video.num_frames
    tokens, features = [], []
    for kind, group in groupby(clips, key=lambda clip: clip.source.kind):
        for part in _parts(list(group), batch_size):
            # An image is one frame, as in training.
            taken = 1 if kind == "image" else num_frames
            frames_BTHWC = torch.stack([read_clip(clip, taken, decoder) for clip in part]).to(device)
            tokens_BND, feature_BE = encoder.encode_video(normalise(frames_BTHWC))
            tokens.append(tokens_BND)
            features.append(feature_BE)
    return VideoEmbeddings(torch.cat(tokens), torch.cat(features))


@torch.inference_mode()
def embed_texts(encoder: DualEncoder, captions: Sequence[str], tokenizer: Tokenizer, batch_size: int) -> TextEmbeddings:
    """Encodes captions, `batch_size` at a time."""
    device = next(encoder.parameters()).device
    texts, masks, features = [], [], []
    for part in _parts(captions, batch_size):
        ids_BL, mask_BL = (tensor.to(device) for tensor in tokenizer(part))
        text_BLD, feature_BE = encoder.encode_text(ids_BL, mask_BL)
        texts.append(text_BLD)
        masks.append(mask_BL)
        features.append(feature_BE)
    return TextEmbeddings(torch.cat(texts), torch.cat(masks), torch.cat(features))


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
