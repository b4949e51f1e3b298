"""Embeddings of whole data sets. Legend: V videos, C captions, N video tokens, L text tokens, D width, E projection."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from alpro_stream.errors import SampleError
from alpro_stream.media import FrameConfig
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.clips import ClipDecoder, read_clip
from alpro_stream.stream.decode import WHOLE_FRAME
from alpro_stream.stream.isolated import ClipRequest, IsolatedError
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


def whole_view(num_frames: int, image_size: int, frames: FrameConfig) -> ClipRequest:
    """A clip as evaluation sees it: frames spread evenly, the whole frame resized.

    Args:
        num_frames: of a clip.
        image_size: side of the pixels.
        frames: those that are chosen from, where whole videos are stored.
    """
    return ClipRequest(num_frames, "uniform", ("evaluation",), WHOLE_FRAME, False, image_size, frames)


def pixels_of(clip: StoredClip, view: ClipRequest, decoder: ClipDecoder) -> Tensor:
    """Pixels of a clip, (T, H, W, 3) uint8; T is 1 for an image.

    Raises:
        SampleError: it cannot be read or decoded.
    """
    place = f"{clip.shard}:{clip.slot} {clip.key}"
    (pixels,) = decoder.decode([read_clip(clip.source, clip.shard, clip.slot, place, view)])
    if isinstance(pixels, IsolatedError):
        raise SampleError(place, pixels.cause, f"it cannot be decoded ({pixels.reason})") from pixels
    return pixels


@torch.inference_mode()
def embed_videos(
    encoder: DualEncoder, clips: Sequence[StoredClip], view: ClipRequest, decoder: ClipDecoder, batch_size: int
) -> VideoEmbeddings:
    """Encodes clips, `batch_size` at a time."""
    device = next(encoder.parameters()).device
    tokens, features = [], []
    for _, group in groupby(clips, key=lambda clip: clip.source.kind):
        for part in _parts(list(group), batch_size):
            frames_BTHWC = torch.stack([pixels_of(clip, view, decoder) for clip in part]).to(device)
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
