"""Makes an index: every rank embeds some shards, and whichever finds all parts there completes it.

Ranks tell each other nothing: what is done is what lies in the folder. So they may begin, end and be killed at any
time, and the same command makes what is missing.
"""

import io
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alpro_stream.errors import CheckpointError, ConfigError, SampleError, ShardError
from alpro_stream.evaluate.embed import StoredClip, embed_videos, evenly_spread
from alpro_stream.evaluate.embed_config import EmbedConfig
from alpro_stream.evaluate.index_files import (
    IndexDescription,
    IndexRow,
    Part,
    begin_index,
    damaged_file,
    part_path,
    read_part,
    write_description,
    write_part,
)
from alpro_stream.manifest.places import is_address
from alpro_stream.shards.layout import ShardInfo
from alpro_stream.shards.storage import TEMPORARY_SUFFIX, file_digest, publish_bytes
from alpro_stream.stream.clips import ClipDecoder, build_clip_decoder
from alpro_stream.stream.sources import Source, SourceConfig, closing_storage, open_sources
from alpro_stream.train.restore import Trained, load_trained

logger = logging.getLogger(__name__)

_LEFTOVER_S = 3600.0


@dataclass(frozen=True, slots=True)
class _Clip:
    """A clip with what the index keeps of it."""

    stored: StoredClip
    media: str

    def row(self) -> IndexRow:
        clip = self.stored
        return IndexRow(clip.source.name, clip.shard, clip.slot, clip.key, clip.captions, self.media)


def embed_index(config: EmbedConfig, rank: int, num_ranks: int, device: torch.device) -> IndexDescription | None:
    """Embeds the shards of a rank that are not there yet.

    Args:
        config: what, by what, and where to.
        rank: this one.
        num_ranks: among which the shards are split.
        device: where the model computes.

    Returns:
        The description of the whole index, on the rank that completed it, or found it complete; else None.

    Raises:
        ConfigError: the folder holds an index of something else, or the model was not trained for features.
        AlproError: data or model cannot be read; see `alpro_stream.errors`.
    """
    with ExitStack() as stack:
        storage = stack.enter_context(closing_storage(config.sources, config.cache, config.fetch))
        sources = open_sources(config.sources, storage=storage)
        trained = load_trained(config.checkpoint, device)
        if trained.description.task == "question_answering":
            raise ConfigError(
                f"{trained.path} is a question answering model, whose features are not trained: embed with one that "
                "was trained with VTC (prompter, pretrain, retrieval)"
            )
        description = _describe(config, sources, trained)
        begin_index(config.out, description)
        _remove_leftovers(config.out / "parts")
        identity = description.identity_sha256()
        shards = [(source, shard) for source in sources for shard in source.shards]
        own = range(rank, len(shards), num_ranks)
        missing = [number for number in own if not _is_whole(config.out, number, identity)]
        if missing:
            maker = _PartMaker(config, trained, identity, stack)
        for done, number in enumerate(missing, start=1):
            start = time.monotonic()
            part = maker.make(number, *shards[number])
            rate = part.num_clips / (time.monotonic() - start)
            text = "rank %d, part %d of its %d: %s of %s, %d clips (%.1f clips/s), %d left out"
            counts = part.num_clips, rate, len(part.left_out)
            logger.info(text, rank, done, len(missing), part.shard, part.source, *counts)
        return _complete(config.out, description, len(shards))


def _describe(config: EmbedConfig, sources: Sequence[Source], trained: Trained) -> IndexDescription:
    model = trained.description.model
    return IndexDescription(
        checkpoint=trained.path.resolve(),
        weights_sha256=trained.weights_sha256,
        data={source.name: source.content for source in sources},
        dimension=model.projection_size,
        num_frames=model.video.num_frames,
        image_size=model.video.image_size,
        versions={name: version(name) for name in ("alpro-stream", "torch")},
        config=config.model_copy(update={"sources": tuple(map(_absolute, config.sources))}),
    )


def _absolute(source: SourceConfig) -> SourceConfig:
    """It is searched from other folders too."""
    places = {"path": source.path, "exclude": source.exclude}
    found = {key: str(Path(place).resolve()) for key, place in places.items() if place and not is_address(place)}
    return source.model_copy(update=found)


def _remove_leftovers(directory: Path) -> None:
    """Of ranks that were killed: no other one takes so long to write a file, and its file must stay."""
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_S:
                leftover.unlink()


def _is_whole(directory: Path, number: int, identity: str) -> bool:
    part = read_part(directory, number)
    if part is not None and part.identity_sha256 == identity and damaged_file(directory, number, part) is None:
        return True
    # Its mark goes first: another rank must not take it for done.
    part_path(directory, number, "json").unlink(missing_ok=True)
    return False


class _PartMaker:
    """Embeds shards, one after the other."""

    def __init__(self, config: EmbedConfig, trained: Trained, identity: str, stack: ExitStack) -> None:
        video = trained.dual.config.video
        device = next(trained.dual.parameters()).device
        self._config = config
        self._identity = identity
        self._dual = trained.dual
        self._choice = evenly_spread(video.num_frames, config.video)
        max_frames = config.batch_size * video.num_frames
        decoder = build_clip_decoder(config.decode, video.image_size, max_frames, device.index)
        self._decoder: ClipDecoder = stack.enter_context(closing(decoder))

    def make(self, number: int, source: Source, shard: ShardInfo) -> Part:
        """Embeds a shard and writes its part."""
        directory = self._config.out
        left_out: list[str] = []
        clips: list[_Clip] = []
        features: list[NDArray[Any]] = [np.empty((0, self._dual.config.projection_size), self._config.dtype)]
        for batch in _batches(source, shard.name, self._config.batch_size, left_out):
            kept, features_NE = self._embed(batch, left_out)
            clips += kept
            features.append(features_NE)
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(features))
        publish_bytes(part_path(directory, number, "npy"), buffer.getvalue())
        lines = "".join(clip.row().to_json() + "\n" for clip in clips)
        publish_bytes(part_path(directory, number, "jsonl"), lines.encode("utf-8", "replace"))
        part = Part(
            identity_sha256=self._identity,
            source=source.name,
            shard=shard.name,
            num_clips=len(clips),
            left_out=tuple(left_out),
            features_sha256=file_digest(part_path(directory, number, "npy")),
            rows_sha256=file_digest(part_path(directory, number, "jsonl")),
        )
        write_part(directory, number, part)
        return part

    def _embed(self, clips: Sequence[_Clip], left_out: list[str]) -> tuple[list[_Clip], NDArray[Any]]:
        """Features of those clips that can be read."""
        kept = list(clips)
        while kept:
            try:
                stored = [clip.stored for clip in kept]
                videos = embed_videos(self._dual, stored, self._choice, self._decoder, self._config.batch_size)
            except SampleError as error:
                place = error.place.partition(" ")[0]
                readable = [clip for clip in kept if f"{clip.stored.shard}:{clip.stored.slot}" != place]
                if len(readable) == len(kept):
                    raise
                left_out.append(str(error))
                kept = readable
                continue
            if not videos.feature_VE.isfinite().all():
                raise CheckpointError(f"the model {self._config.checkpoint} gives features that are not finite (nan)")
            return kept, videos.feature_VE.cpu().numpy().astype(self._config.dtype)
        return [], np.empty((0, self._dual.config.projection_size), self._config.dtype)


def _batches(source: Source, shard: str, size: int, left_out: list[str]) -> Iterator[list[_Clip]]:
    """The samples of a shard, without those that an exclude list names."""
    excluded = set(source.listing.excluded.get(shard, ()))
    batch: list[_Clip] = []
    for slot in range(len(source.reader.index(shard))):
        if slot in excluded:
            continue
        try:
            metadata = source.reader.metadata(shard, slot)
        except SampleError as error:
            left_out.append(str(error))
            continue
        stored = StoredClip(source, shard, slot, metadata.key, metadata.captions)
        batch.append(_Clip(stored, str(metadata.source.get("media", ""))))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _complete(directory: Path, description: IndexDescription, num_parts: int) -> IndexDescription | None:
    parts = [read_part(directory, number) for number in range(num_parts)]
    identity = description.identity_sha256()
    found = tuple(part for part in parts if part is not None and part.identity_sha256 == identity)
    if len(found) < num_parts:
        return None
    if not any(part.num_clips for part in found):
        first = next((reason for part in found for reason in part.left_out), "there are none")
        raise ShardError(f"no clip of the data sets could be embedded; the first: {first}")
    begin_index(directory, description)  # Another one may have been begun here after this one's was removed.
    whole = description.model_copy(update={"parts": found})
    write_description(directory, whole)
    return whole
