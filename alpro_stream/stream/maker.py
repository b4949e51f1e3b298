"""One planned step to a `Batch`: reads the members, decodes them, tokenises, and makes every random choice."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import DataError
from alpro_stream.shards.sample import SampleMetadata
from alpro_stream.stream.augment import RECIPES, augment, draw_operations
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.crops import black_outside, pem_crop_box, random_window
from alpro_stream.stream.decode import WHOLE_FRAME, DecodeConfig, FrameDecoder, FrameRequest, decoder_name
from alpro_stream.stream.frames import FramePolicy, choose_frames
from alpro_stream.stream.plan import PLAN_VERSION, Mix, Plan
from alpro_stream.stream.seeds import Draws
from alpro_stream.stream.sources import Source, SourceConfig
from alpro_stream.stream.text import TextConfig, Tokenizer


class StreamConfig(Config):
    """What is read, in which order, and what is drawn at random."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets to read."""
    seed: int = 42
    """Seed of the order and of every draw."""
    global_batch: int = Field(default=256, ge=2)
    """Samples of one optimizer step, over all ranks and micro-batches."""
    num_lanes: int = Field(default=16, ge=1)
    """Parallel streams; fixed for a run, divided by the number of ranks."""
    window_shards: int = Field(default=8, ge=1)
    """K: shards whose samples are mixed together."""
    mix: Mix = "sizes"
    """Which source a step takes: in proportion to sizes or weights, or alternating."""
    frames: FramePolicy = "headtail"
    """Which stored frames a step takes; `headtail` as in published pre-training."""
    crop_scale: float = Field(default=0.875, gt=0, le=1)
    """Side of the random window over that of the stored frame; published: 224 of 256."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Mirrors all frames of a clip; captions that say left or right then no longer hold."""
    augment: bool = False
    """The published random operations (`alpro_stream.stream.augment`), the same for all frames of a clip. Mirroring is
    one of them for videos, which `flip_probability` then leaves alone."""
    crop_only_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples of which only PEM's crop is shown, black around it, as a frozen prompter is asked later.
    0 as published; a prompter trained on few clips finds such pictures foreign, and names the same entities for all."""
    text: TextConfig
    """Captions to tokens."""
    decode: DecodeConfig = DecodeConfig()
    """Bytes to pixels."""


def make_plan(config: StreamConfig, sources: Sequence[Source]) -> Plan:
    """The order of a run over its opened sources."""
    return Plan(
        [source.shape for source in sources],
        seed=config.seed,
        global_batch=config.global_batch,
        num_lanes=config.num_lanes,
        window_shards=config.window_shards,
        mix=config.mix,
    )


def fingerprint(
    config: StreamConfig, sources: Sequence[Source], tokenizer: Tokenizer, num_frames: int
) -> dict[str, Any]:
    """Everything that decides which pixels and tokens a step gets; compared when a run goes on."""
    # Where data and tokenizer lie does not matter, what they hold does: their digests stand for them.
    settings = config.model_dump(mode="json", exclude={"sources": True, "decode": True, "text": {"tokenizer"}})
    return {
        **settings,
        "plan_version": PLAN_VERSION,
        # By number: the mix depends on the order of the sources.
        "sources": {str(number): _describe(source, config.mix) for number, source in enumerate(sources)},
        "num_frames": num_frames,
        "decoder": decoder_name(config.decode),
        "tokenizer": tokenizer.digest,
    }


@dataclass(frozen=True)
class BatchMaker:
    """Turns planned samples into a `Batch`: a pure function of the step and of the stored bytes."""

    config: StreamConfig
    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    decoder: FrameDecoder
    num_frames: int
    image_size: int
    patch_size: int

    def make(self, plan: Plan, step: int, lanes: range) -> Batch:
        """The samples of these lanes in a step.

        Raises:
            DataError: a sample cannot be used; the message begins with ``shard:slot key``.
            ShardError: a tar or its index is missing, cut off or damaged.
        """
        planned = plan.part(step, lanes)
        source = self.sources[planned.source]
        refs = planned.refs.reshape(-1, 2).tolist()
        samples = [self._read(source, planned.pass_index, shard, slot) for shard, slot in refs]
        return self._assemble(source, step, lanes, samples, self._decode(samples))

    def _read(self, source: Source, pass_index: int, shard: int, slot: int) -> "_Sample":
        name = source.shards[shard].name
        metadata = source.reader.metadata(name, slot)
        stored = source.reader.frame_members(name, slot)
        place = f"{name}:{slot} {metadata.key}"
        if not stored or not metadata.captions:
            raise DataError(
                f"{place}: {len(stored)} frames and {len(metadata.captions)} captions stored, expected at least one of "
                "each; shard its data set again"
            )
        identity = (self.config.seed, source.name, pass_index, metadata.key)
        # An image is one frame, whatever the model's number of frames: it is repeated as a view, by the encoder.
        num_frames = 1 if source.kind == "image" else self.num_frames
        chosen = choose_frames(len(stored), num_frames, self.config.frames, Draws("frames", *identity))
        # A frame that is taken several times (of a short clip) is read and decoded once.
        distinct, positions = np.unique(chosen, return_inverse=True)
        jpegs = source.reader.read(name, slot, [stored[index] for index in distinct])
        window = WHOLE_FRAME
        if self.config.crop_scale < 1:
            window = random_window(source.stored_size, self.config.crop_scale, Draws("crop", *identity))
        flips_itself = self.config.augment and source.kind == "video"
        flip = not flips_itself and bool(Draws("flip", *identity).uniform(1)[0] < self.config.flip_probability)
        caption = metadata.captions[Draws("caption", *identity).integer(len(metadata.captions))]
        requests = tuple(FrameRequest(jpeg, window, flip) for jpeg in jpegs)
        return _Sample(place, identity, metadata, caption, requests, positions)

    def _decode(self, samples: Sequence["_Sample"]) -> torch.Tensor:
        try:
            decoded = self.decoder.decode([request for sample in samples for request in sample.requests])
        except ValueError as error:
            raise self._name_the_damaged(samples, error) from error
        clips, start = [], 0
        for sample in samples:
            own = decoded[start : start + len(sample.requests)]
            if self.config.augment:
                own = augment(own, draw_operations(RECIPES[sample.metadata.kind], Draws("augment", *sample.identity)))
            clips.append(own[torch.from_numpy(sample.positions).to(own.device)])
            start += len(sample.requests)
        return torch.stack(clips)

    def _name_the_damaged(self, samples: Sequence["_Sample"], error: ValueError) -> DataError:
        """A decoder refuses a batch as a whole: decode one by one to say which sample it was."""
        for sample in samples:
            try:
                self.decoder.decode(sample.requests)
            except ValueError as cause:
                return DataError(
                    f"{sample.place}: a stored frame cannot be decoded ({cause}); the shard is damaged: "
                    "run `alpro inspect --verify` on its data set, and shard it again"
                )
        return DataError(
            f"{samples[0].place} and the {len(samples) - 1} samples after it cannot be decoded together, though each "
            f"can alone: {error}"
        )

    def _assemble(
        self,
        source: Source,
        step: int,
        lanes: range,
        samples: Sequence["_Sample"],
        frames: torch.Tensor,
    ) -> Batch:
        captions = tuple(sample.caption for sample in samples)
        ids, mask = self.tokenizer(captions)
        masked = [
            self.tokenizer.mask(row, self.config.text.mlm_probability, Draws("mlm", *sample.identity))
            for row, sample in zip(ids.numpy(), samples, strict=True)
        ]
        boxes = [pem_crop_box(self.image_size, self.patch_size, Draws("pem", *s.identity)) for s in samples]
        for clip_THWC, box, sample in zip(frames, boxes, samples, strict=True):
            if Draws("crop only", *sample.identity).uniform(1)[0] < self.config.crop_only_probability:
                black_outside(clip_THWC, box * self.patch_size)
        return Batch(
            step=step,
            source=source.name,
            kind=source.kind,
            first_lane=lanes.start,
            num_lanes=len(lanes),
            keys=tuple(sample.metadata.key for sample in samples),
            captions=captions,
            frames_BTHWC=frames,
            ids_BL=ids,
            mask_BL=mask,
            mlm_ids_BL=torch.from_numpy(np.stack([text.ids_L for text in masked])),
            mlm_labels_BL=torch.from_numpy(np.stack([text.labels_L for text in masked])),
            boxes_B4=torch.from_numpy(np.stack(boxes)),
            video_id_B=_identities(f"{source.name}\x1f{sample.metadata.key}" for sample in samples),
            text_id_B=_identities(caption.casefold().strip() for caption in captions),
            noise_B2N=negative_noise(self.config.seed, step, lanes, len(samples) // len(lanes)),
        )


@dataclass(frozen=True)
class _Sample:
    """A sample as it was read, and what was drawn for it; `positions` says which request each frame shows."""

    place: str
    identity: tuple[int, str, int, str]
    metadata: SampleMetadata
    caption: str
    requests: tuple[FrameRequest, ...]
    positions: np.ndarray[Any, np.dtype[np.int64]]


def negative_noise(seed: int, step: int, lanes: range, size: int) -> torch.Tensor:
    """`Batch.noise_B2N` of these lanes, drawn per (seed, step, lane).

    Args:
        seed: of the run.
        step: position in the run.
        lanes: numbers of the lanes.
        size: samples of a lane.
    """
    draws = [Draws("negatives", seed, step, lane).exponential(2, size, size) for lane in lanes]
    return torch.from_numpy(np.concatenate(draws, axis=1).swapaxes(0, 1).astype(np.float32))


def _describe(source: Source, mix: Mix) -> dict[str, Any]:
    """What the fingerprint holds of a source; weights count only where they decide the order."""
    weight = source.weight if mix == "weights" else None
    return {"name": source.name, "kind": source.kind, "dataset": source.reader.info.digest, "weight": weight}


def _identities(names: Iterator[str]) -> torch.Tensor:
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
