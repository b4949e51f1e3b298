"""Embeddings of whole data sets.

Legend: V videos, K clips (rows of a video follow each other), C captions, T frames, N video tokens, L text tokens,
D width, E projection.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

import torch
from torch import Tensor

from alpro_stream.errors import SampleError
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.media import FrameConfig
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.clips import ClipDecoder, read_clip
from alpro_stream.stream.isolated import FrameChoice
from alpro_stream.stream.sources import Source
from alpro_stream.stream.text import Tokenizer
from alpro_stream.stream.view import View


@dataclass(frozen=True)
class StoredClip:
    """Where a clip lies, and what is known of it."""

    source: Source
    shard: str
    slot: int
    key: str
    captions: tuple[str, ...]
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class VideoEmbeddings:
    """Every clip encoded once: tokens for the multimodal encoder, features for comparing.

    K is V where a video is looked at as one clip, else there are several rows for each.
    """

    tokens_VND: Tensor
    feature_VE: Tensor


@dataclass(frozen=True)
class TextEmbeddings:
    """Every caption encoded once."""

    text_CLD: Tensor
    mask_CL: Tensor
    feature_CE: Tensor


def stored_clips(sources: Sequence[Source], most: int | None = None) -> list[StoredClip]:
    """Samples of the sources that are not excluded, in the order of their shards; sources of unit `clip`.

    Args:
        sources: opened.
        most: of all samples, the first so many; None takes all.
    """
    return list(islice(_stored_clips(sources), most))


def _stored_clips(sources: Sequence[Source]) -> Iterator[StoredClip]:
    for source in sources:
        for number, (shard, num_clips) in enumerate(zip(source.shards, source.shape.shard_sizes, strict=True)):
            for unit in range(num_clips):
                slot, _ = source.locate(number, unit)
                metadata = source.reader.metadata(shard.name, slot)
                questions, answers = (tuple(pair[part] for pair in metadata.qa) for part in (0, 1))
                yield StoredClip(source, shard.name, slot, metadata.key, metadata.captions, questions, answers)


def evenly_spread(num_frames: int, stored: FrameConfig) -> FrameChoice:
    """The frames of a video that evaluation sees, those of all its clips.

    Args:
        num_frames: of all clips together; each clip shows as many that follow each other.
        stored: those that are chosen from, where whole videos are stored.
    """
    return FrameChoice(num_frames, "uniform", ("evaluation",), stored)


def pixels_of(clips: Sequence[StoredClip], choice: FrameChoice, decoder: ClipDecoder) -> Tensor:
    """Pixels of whole frames, resized: (B, T, H, W, 3) uint8 where the decoder writes.

    Args:
        clips: all of videos, or all of images: T is 1 for these.
        choice: which frames of a video.
        decoder: of the size that is wanted.

    Raises:
        SampleError: one cannot be read or decoded.
    """
    if clips[0].source.kind == "image":
        choice = replace(choice, num_frames=1)
    places = [f"{clip.shard}:{clip.slot} {clip.key}" for clip in clips]
    read = [
        read_clip(clip.source, clip.shard, clip.slot, place, choice, View())
        for clip, place in zip(clips, places, strict=True)
    ]
    pixels_BTHWC = decoder.empty(len(clips), choice.num_frames)
    for place, error in zip(places, decoder.decode(read, pixels_BTHWC), strict=True):
        if error is not None:
            raise SampleError(place, error.cause, f"it cannot be decoded ({error.reason})") from error
    return pixels_BTHWC


@torch.inference_mode()
def embed_videos(
    encoder: DualEncoder,
    clips: Sequence[StoredClip],
    choice: FrameChoice,
    decoder: ClipDecoder,
    batch_size: int,
    num_clips: int = 1,
) -> VideoEmbeddings:
    """Encodes videos.

    Args:
        encoder: of a model.
        clips: the videos; an image is one clip, which stands for all of them.
        choice: frames of a video, `num_clips` times as many as the model takes.
        decoder: of the size that the model takes.
        batch_size: clips that are encoded at once.
        num_clips: into which the frames of a video are cut.

    Raises:
        SampleError: one cannot be read or decoded.
    """
    device = next(encoder.parameters()).device
    tokens, features = [], []
    for kind, group in groupby(clips, key=lambda clip: clip.source.kind):
        for part in in_parts(list(group), batch_size // num_clips, f"{kind}s"):
            frames_BTHWC = pixels_of(part, choice, decoder).to(device)
            is_cut = kind == "video"
            if is_cut:
                frames_BTHWC = frames_BTHWC.reshape(len(part) * num_clips, -1, *frames_BTHWC.shape[2:])
            tokens_KND, feature_KE = encoder.encode_video(normalise(frames_BTHWC))
            tokens.append(tokens_KND if is_cut else tokens_KND.repeat_interleave(num_clips, dim=0))
            features.append(feature_KE if is_cut else feature_KE.repeat_interleave(num_clips, dim=0))
    return VideoEmbeddings(torch.cat(tokens), torch.cat(features))


@torch.inference_mode()
def embed_texts(
    encoder: DualEncoder, captions: Sequence[str], tokenizer: Tokenizer, batch_size: int, num_tokens: int | None = None
) -> TextEmbeddings:
    """Encodes captions, `batch_size` at a time, cut or padded to `num_tokens` (None: as in training)."""
    device = next(encoder.parameters()).device
    texts, masks, features = [], [], []
    for part in in_parts(captions, batch_size, "texts"):
        ids_BL, mask_BL = (tensor.to(device) for tensor in tokenizer(part, num_tokens))
        text_BLD, feature_BE = encoder.encode_text(ids_BL, mask_BL)
        texts.append(text_BLD)
        masks.append(mask_BL)
        features.append(feature_BE)
    return TextEmbeddings(torch.cat(texts), torch.cat(masks), torch.cat(features))
