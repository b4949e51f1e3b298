"""One planned step to a `Batch`: reads the members, decodes them, tokenises, and makes every random choice.

In two halves, so that a loader can read one batch while it decodes another: `read` needs the storage, `finish` the
cores. Samples that cannot be used are replaced in `finish`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from alpro_stream.errors import SampleError
from alpro_stream.shards.sample import SampleMetadata
from alpro_stream.stream.augment import RECIPES, augment, draw_operations
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.clips import ClipDecoder, FramesClip, VideoClip, read_clip
from alpro_stream.stream.config import StreamConfig
from alpro_stream.stream.crops import black_outside, pem_crop_box, random_window
from alpro_stream.stream.decode import WHOLE_FRAME
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import ClipRequest, IsolatedError
from alpro_stream.stream.plan import Plan, PlannedStep
from alpro_stream.stream.quarantine import Failure, Occurrence, Quarantine, QuarantineConfig
from alpro_stream.stream.seeds import Draws, sample_keys
from alpro_stream.stream.sources import Source
from alpro_stream.stream.text import Tokenizer
from alpro_stream.stream.units import same_text, same_video, text_number, texts_of

# Where the left-over is damaged too: enough that a run of bad luck finds one, few enough to end soon.
_MAX_SUBSTITUTES = 16
# Each of these costs a deadline or two, while the other ranks wait.
_SLOW, _MAX_SLOW_SUBSTITUTES = ("deadline", "crash"), 2


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample as it was read, and what was drawn for it."""

    place: str
    identity: tuple[int | str, ...]
    metadata: SampleMetadata
    text: str
    answer: str
    clip: FramesClip | VideoClip


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A step whose stored bytes are here; what could not be read is an error in its place."""

    planned: PlannedStep
    lanes: range
    samples: list[Sample | SampleError]

    @property
    def num_bytes(self) -> int:
        """Size of what is stored of it."""
        return sum(sample.clip.num_bytes for sample in self.samples if isinstance(sample, Sample))


@dataclass(frozen=True)
class BatchMaker:
    """Turns planned samples into a `Batch`: a pure function of the step, the stored bytes, and the record of failures.

    Attributes:
        config: what to do.
        sources: opened.
        tokenizer: texts to tokens.
        decoder: bytes to pixels.
        num_frames: of a clip.
        image_size: side of the pixels, in pixels.
        patch_size: side of the model's patches, in pixels.
        quarantine: what is known of unusable samples, and how many are too many.
        gauges: get what was done.
    """

    config: StreamConfig
    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    decoder: ClipDecoder
    num_frames: int
    image_size: int
    patch_size: int
    quarantine: Quarantine = field(default_factory=lambda: Quarantine(QuarantineConfig()))
    gauges: Gauges = field(default_factory=Gauges)

    def make(self, plan: Plan, step: int, lanes: range) -> Batch:
        """The samples of these lanes in a step.

        Raises:
            QuarantineError: too many samples cannot be used.
            ShardError: a tar or its index is missing or cannot be read.
        """
        return self.finish(plan, self.read(plan, step, lanes))

    def read(self, plan: Plan, step: int, lanes: range) -> ReadBatch:
        """Everything that `make` needs from the storage; errors as there."""
        planned = plan.part(step, lanes)
        with self.gauges.busy("read"):
            first = lanes.start * plan.lane_batch
            samples = [
                self._read(planned, first + row, shard, unit)
                for row, (shard, unit) in enumerate(planned.refs.reshape(-1, 2).tolist())
            ]
        batch = ReadBatch(planned, lanes, samples)
        self.gauges.count("storage_bytes", batch.num_bytes)
        return batch

    def finish(self, plan: Plan, batch: ReadBatch) -> Batch:
        """Everything that `make` does with what was read; errors as there."""
        decoded: list[_Decoded | None] = []
        failures: list[Failure | None] = []
        with self.gauges.busy("decode"):
            for row, outcome in enumerate(self._decode(batch.planned, batch.samples)):
                if isinstance(outcome, SampleError):
                    # Before a substitute is looked for, which may take long.
                    self.quarantine.count(outcome)
                    substitute, failure = self._substitute(plan, batch, row, outcome)
                    decoded.append(substitute)
                    failures.append(failure)
                else:
                    self.quarantine.count(None)
                    decoded.append(outcome)
                    failures.append(None)
        self.gauges.count("clips", len(decoded))
        self.gauges.count("quarantined", sum(failure is not None for failure in failures))
        return self._assemble(batch, decoded, failures)

    def close(self) -> None:
        """Ends the decoder's processes and closes the record of failures."""
        self.decoder.close()
        self.quarantine.close()

    def _read(self, planned: PlannedStep, row: int, shard: int, unit: int) -> Sample | SampleError:
        """A sample for a row of the global batch."""
        source = self.sources[planned.source]
        try:
            known = self.quarantine.recall(Occurrence(planned.step, row, source.shards[shard].name, unit))
            return known or self._read_stored(source, planned.pass_index, shard, unit)
        except SampleError as error:
            return error

    def _read_stored(self, source: Source, pass_index: int, shard: int, unit: int) -> Sample:
        name = source.shards[shard].name
        slot, number = source.locate(shard, unit)
        metadata = source.reader.metadata(name, slot)
        place = f"{name}:{slot} {metadata.key}"
        # One clip several times in a pass is seen differently each time.
        which = () if number is None else (number,)
        identity = (self.config.seed, source.name, pass_index, metadata.key, *which)
        text, answer = _text_of(source, metadata, number, identity, place)
        return Sample(
            place, identity, metadata, text, answer, read_clip(source, name, slot, place, self._view(source, identity))
        )

    def _view(self, source: Source, identity: tuple[int | str, ...]) -> ClipRequest:
        """Which frames of a clip, and which part of them, are drawn for it."""
        window = WHOLE_FRAME
        if self.config.crop_scale < 1:
            size = self.config.video.size if source.stores_videos else source.stored_size
            window = random_window(size, self.config.crop_scale, Draws("crop", *identity))
        flips_itself = self.config.augment and source.kind == "video"
        flip = not flips_itself and bool(Draws("flip", *identity).uniform(1)[0] < self.config.flip_probability)
        return ClipRequest(
            num_frames=self.num_frames,
            policy=self.config.frames,
            identity=identity,
            window=window,
            flip=flip,
            image_size=self.image_size,
            frames=self.config.video,
        )

    def _decode(self, planned: PlannedStep, samples: Sequence[Sample | SampleError]) -> list["_Decoded | SampleError"]:
        """Pixels of each sample, augmented; an error where there are none."""
        read = [sample for sample in samples if isinstance(sample, Sample)]
        pixels = iter(self.decoder.decode([sample.clip for sample in read]))
        outcomes: list[_Decoded | SampleError] = []
        for sample in samples:
            if isinstance(sample, SampleError):
                outcomes.append(sample)
                continue
            found = next(pixels)
            if isinstance(found, IsolatedError):
                outcomes.append(SampleError(sample.place, found.cause, found.reason))
                continue
            self.gauges.count("frames", len(found))
            if self.config.augment:
                recipe = RECIPES[self.sources[planned.source].kind]
                found = augment(found, draw_operations(recipe, Draws("augment", *sample.identity)))
            outcomes.append(_Decoded(sample, found))
        return outcomes

    def _substitute(
        self, plan: Plan, batch: ReadBatch, row: int, error: SampleError
    ) -> tuple["_Decoded | None", Failure]:
        """What takes the place of a sample, None where the left-over has nothing; and the failure, recorded."""
        planned = batch.planned
        source = self.sources[planned.source]
        lane, place = divmod(row, plan.lane_batch)
        row += batch.lanes.start * plan.lane_batch
        failed = [(*planned.refs[lane, place].tolist(), error)]
        found: _Decoded | None = None
        for shard, unit in plan.substitutes(planned.step, batch.lanes[lane], place)[:_MAX_SUBSTITUTES].tolist():
            (outcome,) = self._decode(planned, [self._read(planned, row, shard, unit)])
            if not isinstance(outcome, SampleError):
                found = outcome
                break
            failed.append((shard, unit, outcome))
            if sum(error.cause in _SLOW for *_, error in failed[1:]) >= _MAX_SLOW_SUBSTITUTES:
                break
        failures = [
            Failure(
                occurrence=Occurrence(planned.step, row, source.shards[shard].name, unit),
                source=source.name,
                data=source.content,
                pass_index=planned.pass_index,
                place=e.place,
                cause=e.cause,
                reason=e.reason,
                substitute=None if found is None else found.sample.place,
            )
            for shard, unit, e in failed
        ]
        for failure in failures:
            self.quarantine.record(failure)
        return found, failures[0]

    def _assemble(
        self, batch: ReadBatch, decoded: Sequence["_Decoded | None"], failures: Sequence[Failure | None]
    ) -> Batch:
        planned, lanes = batch.planned, batch.lanes
        source = self.sources[planned.source]
        # Where nothing could be found: a black clip without words, which no loss looks at.
        identities = [
            one.sample.identity if one else ("masked", planned.step, lanes.start, row)
            for row, one in enumerate(decoded)
        ]
        texts = tuple(one.sample.text if one else "" for one in decoded)
        with self.gauges.busy("text"):
            ids, mask = self.tokenizer(texts)
            masked = self.tokenizer.mask(ids.numpy(), sample_keys(identities, "mlm"), self.config.text.mlm_probability)
        frames = self._stack(source, decoded)
        boxes = [pem_crop_box(self.image_size, self.patch_size, Draws("pem", *identity)) for identity in identities]
        for clip_THWC, box, identity in zip(frames, boxes, identities, strict=True):
            if Draws("crop only", *identity).uniform(1)[0] < self.config.crop_only_probability:
                black_outside(clip_THWC, box * self.patch_size)
        keys = [
            one.sample.metadata.key if one else _key_of(failure) for one, failure in zip(decoded, failures, strict=True)
        ]
        videos = [same_video(one.sample.metadata) if one else f"masked {row}" for row, one in enumerate(decoded)]
        return Batch(
            step=planned.step,
            source=source.name,
            kind=source.kind,
            first_lane=lanes.start,
            num_lanes=len(lanes),
            keys=tuple(keys),
            captions=texts,
            answers=tuple(one.sample.answer if one else "" for one in decoded),
            num_quarantined=sum(failure is not None for failure in failures),
            frames_BTHWC=frames,
            ids_BL=ids,
            mask_BL=mask,
            mlm_ids_BL=torch.from_numpy(masked.ids_BL),
            mlm_labels_BL=torch.from_numpy(masked.labels_BL),
            boxes_B4=torch.from_numpy(np.stack(boxes)),
            valid_B=torch.tensor([one is not None for one in decoded]),
            video_id_B=_identities(f"{source.name}\x1f{video}" for video in videos),
            text_id_B=_identities(same_text(text) for text in texts),
            noise_B2N=negative_noise(self.config.seed, planned.step, lanes, len(decoded) // len(lanes)),
        )

    def _stack(self, source: Source, decoded: Sequence["_Decoded | None"]) -> torch.Tensor:
        """Pixels of the whole batch, (B, T, H, W, 3); black where there are none."""
        some = next((one.pixels for one in decoded if one), None)
        if some is None:
            num_frames = 1 if source.kind == "image" else self.num_frames
            some = torch.zeros(num_frames, self.image_size, self.image_size, 3, dtype=torch.uint8)
        return torch.stack([one.pixels.to(some.device) if one else torch.zeros_like(some) for one in decoded])


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A sample and its pixels, (T, H, W, 3) uint8."""

    sample: Sample
    pixels: torch.Tensor


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


def _text_of(
    source: Source, metadata: SampleMetadata, number: int | None, identity: tuple[int | str, ...], place: str
) -> tuple[str, str]:
    """The text of a unit, and the answer where it is a question.

    Raises:
        SampleError: there is no such text.
    """
    texts = texts_of(source.unit, metadata)
    if len(texts) <= (number or 0):
        what = "questions" if source.unit == "question" else "captions"
        raise SampleError(place, "empty", f"{len(texts)} {what} stored, expected at least {(number or 0) + 1}")
    number = text_number(number, len(texts), identity)
    return texts[number], metadata.qa[number].answer if source.unit == "question" else ""


def _key_of(failure: Failure | None) -> str:
    assert failure is not None
    return failure.place.partition(" ")[2]


def _identities(names: Iterator[str]) -> torch.Tensor:
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
