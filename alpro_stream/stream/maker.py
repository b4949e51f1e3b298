"""One planned step to a `Batch`: reads the members, decodes them, tokenises, and makes every random choice.

In three parts, so that a loader can read one batch while another is decoded: `read` needs the storage, `start` hands
the bytes to the decoder, `finish` waits for the pixels. Samples that cannot be used are replaced in `finish`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from alpro_stream.errors import SampleError
from alpro_stream.shards.sample import SampleMetadata
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.clips import ClipDecoder, FramesClip, VideoClip, read_clip
from alpro_stream.stream.config import StreamConfig
from alpro_stream.stream.crops import black_outside, draw_view, pem_crop_boxes
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.isolated import FrameChoice
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
    """A step whose stored bytes are here; what could not be read is an error in its place.

    Attributes:
        planned: the step.
        lanes: of this batch.
        samples: as they were read.
    """

    planned: PlannedStep
    lanes: range
    samples: list[Sample | SampleError]

    @property
    def num_bytes(self) -> int:
        """Size of what is stored of it."""
        return sum(sample.clip.num_bytes for sample in self.samples if isinstance(sample, Sample))


@dataclass(frozen=True, slots=True)
class StartedBatch:
    """A step that is being decoded.

    Attributes:
        read: what was read of it.
        pixels_BTHWC: where they go.
        outcomes: waits for them; gives the samples, an error in place of each that has none.
    """

    read: ReadBatch
    pixels_BTHWC: Tensor
    outcomes: Callable[[], list[Sample | SampleError]]


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
        return self.finish(plan, self.start(self.read(plan, step, lanes)))

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

    def start(self, batch: ReadBatch) -> StartedBatch:
        """Begins to decode what was read; other batches may be started before this one is finished."""
        pixels_BTHWC = self.decoder.empty(len(batch.samples), self._num_frames(self.sources[batch.planned.source]))
        with self.gauges.busy("decode"):
            return StartedBatch(batch, pixels_BTHWC, self._start(batch.samples, pixels_BTHWC))

    def finish(self, plan: Plan, started: StartedBatch) -> Batch:
        """Everything that is left to do, for the batch that was started first; errors as of `make`."""
        batch, pixels_BTHWC = started.read, started.pixels_BTHWC
        samples: list[Sample | None] = []
        failures: dict[int, Failure] = {}
        with self.gauges.busy("decode"):
            for row, outcome in enumerate(started.outcomes()):
                if isinstance(outcome, SampleError):
                    # Before a substitute is looked for, which may take long.
                    self.quarantine.count(outcome)
                    substitute, failures[row] = self._substitute(plan, batch, row, outcome, pixels_BTHWC[row : row + 1])
                    samples.append(substitute)
                else:
                    self.quarantine.count(None)
                    samples.append(outcome)
        self.gauges.count("clips", len(samples))
        self.gauges.count("quarantined", len(failures))
        finished = self._assemble(batch, samples, failures, self.decoder.finished(pixels_BTHWC))
        self._hide_outside(finished, samples)
        return finished

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
        choice = FrameChoice(self._num_frames(source), self.config.frames, identity, self.config.video)
        view = draw_view(
            source.kind,
            self._stored_size(source),
            identity,
            crop_scale=self.config.crop_scale,
            flip_probability=self.config.flip_probability,
            augment=self.config.augment,
        )
        clip = read_clip(source, name, slot, place, choice, view)
        return Sample(place, identity, metadata, text, answer, clip)

    def _start(
        self, samples: Sequence[Sample | SampleError], out_BTHWC: Tensor
    ) -> Callable[[], list[Sample | SampleError]]:
        """Begins to write the pixels of each sample; what waits for them gives an error in place of each without."""
        rows = [row for row, sample in enumerate(samples) if isinstance(sample, Sample)]
        clips = [sample.clip for sample in samples if isinstance(sample, Sample)]
        whole = len(rows) == len(samples)
        room = out_BTHWC if whole else self.decoder.empty(len(rows), out_BTHWC.shape[1])
        decoded = self.decoder.start(clips, room)

        def finish() -> list[Sample | SampleError]:
            outcomes = list(samples)
            for row, error in zip(rows, decoded(), strict=True):
                if error is not None:
                    outcomes[row] = SampleError(samples[row].place, error.cause, error.reason)
            if not whole:
                out_BTHWC[rows] = room
            self.gauges.count("frames", sum(isinstance(one, Sample) for one in outcomes) * out_BTHWC.shape[1])
            return outcomes

        return finish

    def _substitute(
        self, plan: Plan, batch: ReadBatch, row: int, error: SampleError, out_1THWC: Tensor
    ) -> tuple[Sample | None, Failure]:
        """What takes the place of a sample, None and black where the left-over has nothing; the failure, recorded."""
        planned = batch.planned
        source = self.sources[planned.source]
        lane, place = divmod(row, plan.lane_batch)
        row += batch.lanes.start * plan.lane_batch
        failed = [(*planned.refs[lane, place].tolist(), error)]
        found: Sample | None = None
        for shard, unit in plan.substitutes(planned.step, batch.lanes[lane], place)[:_MAX_SUBSTITUTES].tolist():
            (outcome,) = self._start([self._read(planned, row, shard, unit)], out_1THWC)()
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
                substitute=None if found is None else found.place,
            )
            for shard, unit, e in failed
        ]
        for failure in failures:
            self.quarantine.record(failure)
        if found is None:
            out_1THWC.zero_()
        return found, failures[0]

    def _assemble(
        self, batch: ReadBatch, samples: Sequence[Sample | None], failures: Mapping[int, Failure], pixels_BTHWC: Tensor
    ) -> Batch:
        """The batch, with what is drawn for each sample. Where there is none: a clip without words, which no loss sees.

        Args:
            batch: as it was read.
            samples: of each row.
            failures: of the rows that are not as planned.
            pixels_BTHWC: of each row.
        """
        planned, lanes = batch.planned, batch.lanes
        identities = [
            sample.identity if sample else ("masked", planned.step, lanes.start, row)
            for row, sample in enumerate(samples)
        ]
        texts = tuple(sample.text if sample else "" for sample in samples)
        with self.gauges.busy("text"):
            ids, mask = self.tokenizer(texts)
            masked = self.tokenizer.mask(ids.numpy(), sample_keys(identities, "mlm"), self.config.text.mlm_probability)
        source = self.sources[planned.source]
        boxes_B4 = pem_crop_boxes(self.image_size, self.patch_size, sample_keys(identities, "pem"))
        videos = [same_video(sample.metadata) if sample else f"masked {row}" for row, sample in enumerate(samples)]
        return Batch(
            step=planned.step,
            source=source.name,
            kind=source.kind,
            first_lane=lanes.start,
            num_lanes=len(lanes),
            keys=tuple(
                sample.metadata.key if sample else _key_of(failures.get(row)) for row, sample in enumerate(samples)
            ),
            captions=texts,
            answers=tuple(sample.answer if sample else "" for sample in samples),
            num_quarantined=len(failures),
            frames_BTHWC=pixels_BTHWC,
            ids_BL=ids,
            mask_BL=mask,
            mlm_ids_BL=torch.from_numpy(masked.ids_BL),
            mlm_labels_BL=torch.from_numpy(masked.labels_BL),
            boxes_B4=torch.from_numpy(boxes_B4),
            valid_B=torch.tensor([sample is not None for sample in samples]),
            video_id_B=_identities(f"{source.name}\x1f{video}" for video in videos),
            text_id_B=_identities(same_text(text) for text in texts),
            noise_B2N=negative_noise(self.config.seed, planned.step, lanes, len(samples) // len(lanes)),
        )

    def _hide_outside(self, batch: Batch, samples: Sequence[Sample | None]) -> None:
        """Leaves nothing but PEM's crop of some clips, see `StreamConfig.crop_only_probability`."""
        if self.config.crop_only_probability == 0:
            return
        for sample, clip_THWC, box in zip(samples, batch.frames_BTHWC, batch.boxes_B4.numpy(), strict=True):
            draws = Draws("crop only", *(sample.identity if sample else ("masked",)))
            if draws.scalar() < self.config.crop_only_probability:
                black_outside(clip_THWC, box * self.patch_size)

    def _stored_size(self, source: Source) -> int | None:
        """Side of the frames that a view is drawn for; None where they are not all squares of one size."""
        if not source.stores_videos:
            return source.stored_size
        return self.config.video.size if self.config.video.resize == "square" else None

    def _num_frames(self, source: Source) -> int:
        # One frame of an image serves for all: it is repeated as a view, by the encoder.
        return 1 if source.kind == "image" else self.num_frames


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
    return failure.place.partition(" ")[2] if failure else ""


def _identities(names: Iterator[str]) -> torch.Tensor:
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
