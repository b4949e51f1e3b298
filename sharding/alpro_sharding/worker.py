"""What one task does: read the media of one planned shard, write the shard, note the result. No Ray in here."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alpro_sharding.assign import PlannedShard
from alpro_sharding.entities import count_nouns
from alpro_stream.errors import MediaError
from alpro_stream.manifest import ManifestRow, sample_key
from alpro_stream.media import SourceInfo, UnreadableError, encode_jpeg, read_image, sparse_frames
from alpro_stream.shards import Sample, SampleMetadata, ShardInfo, ShardWriter
from alpro_stream.shards.storage import publish_bytes

Stage = Literal["manifest", "probe", "decode", "write"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A manifest line that gave no sample.

    Attributes:
        line: line of the manifest, counted from 1.
        id: the row's id, when it could be read.
        media: the row's file, when it could be read.
        stage: ``manifest`` (the line), ``probe`` (opening the file), ``decode`` or ``write``.
        reason: one sentence.
    """

    line: int
    id: str | None
    media: str | None
    stage: Stage
    reason: str


@dataclass(frozen=True, slots=True)
class FrameOptions:
    """How media become stored frames; see `ShardConfig`."""

    fps: float
    max_frames: int
    size: int
    quality: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All a worker needs: rows and paths, no media bytes.

    Attributes:
        planned: the shard and its rows.
        media_root: folder that relative media paths start from.
        directory: folder of the split.
        result_path: where the result is noted once the shard is published.
        options: how media become frames.
    """

    planned: PlannedShard
    media_root: str
    directory: str
    result_path: str
    options: FrameOptions


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of a planned shard.

    Attributes:
        num_rows: rows planned for it.
        shard: its description; None when every row failed.
        failures: the rows that gave no sample, in manifest order.
        nouns: noun counts of the captions of its samples.
    """

    num_rows: int
    shard: ShardInfo | None
    failures: tuple[Failure, ...]
    nouns: dict[str, int]

    def to_json(self) -> bytes:
        """JSON that `from_json` reads."""
        values = {
            "num_rows": self.num_rows,
            "shard": self.shard.model_dump(mode="json") if self.shard else None,
            "failures": [asdict(failure) for failure in self.failures],
            "nouns": dict(sorted(self.nouns.items())),
        }
        return json.dumps(values, ensure_ascii=False).encode("utf-8")

    @classmethod
    def from_json(cls, data: bytes) -> "ShardResult":
        """Reads what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: other bytes.
        """
        values = json.loads(data)
        return cls(
            num_rows=values["num_rows"],
            shard=ShardInfo.model_validate(values["shard"]) if values["shard"] else None,
            failures=tuple(Failure(**failure) for failure in values["failures"]),
            nouns=values["nouns"],
        )


def make_shard(task: ShardTask) -> ShardResult:
    """Makes one shard and notes the result; a row that fails is a `Failure`, it never raises.

    Doing it again gives the same bytes, and each file appears whole or not at all, so a task may die at any moment
    and be repeated.

    Raises:
        ShardError: the target cannot be written.
        OSError: the result cannot be noted.
    """
    planned = task.planned
    failures: list[Failure] = []
    nouns: Counter[str] = Counter()
    shard: ShardInfo | None = None
    samples = _samples(task, failures)
    # The file is made only once there is a sample to put into it.
    if (first := next(samples, None)) is not None:
        with ShardWriter(task.directory, planned.name, planned.kind) as writer:
            sample: Sample | None = first
            while sample is not None:
                writer.add(sample)
                nouns.update(count_nouns(sample.metadata.captions))
                sample = next(samples, None)
            shard = writer.close()
    result = ShardResult(len(planned.rows), shard, tuple(failures), dict(nouns))
    publish_bytes(Path(task.result_path), result.to_json())
    return result


def _samples(task: ShardTask, failures: list[Failure]) -> Iterator[Sample]:
    """The samples of the rows that work; the others are appended to `failures`."""
    for row in task.planned.rows:
        stage: Stage = "decode"
        try:
            frames, timestamps, source = _read_media(row, Path(task.media_root), task.options)
            stage = "write"
            jpegs = tuple(encode_jpeg(pixels, task.options.quality) for pixels in frames)
            sample = Sample(_metadata(row, timestamps, source), jpegs)
        except UnreadableError as error:
            failures.append(Failure(row.line, row.id, row.media, "probe", str(error)))
        except MediaError as error:
            failures.append(Failure(row.line, row.id, row.media, stage, str(error)))
        except Exception as error:  # one strange file must not cost the other rows of its shard
            reason = f"unexpected {type(error).__name__}: {error}"
            failures.append(Failure(row.line, row.id, row.media, stage, reason))
        else:
            yield sample


def _read_media(row: ManifestRow, media_root: Path, options: FrameOptions) -> tuple[Any, tuple[float, ...], SourceInfo]:
    path = media_root / row.media
    if row.kind == "image":
        pixels, source = read_image(path, options.size)
        return (pixels,), (0.0,), source
    clip = sparse_frames(
        path,
        fps=options.fps,
        max_frames=options.max_frames,
        size=options.size,
        start_s=row.start_s,
        end_s=row.end_s,
    )
    return clip.frames, clip.timestamps_s, clip.source


def _metadata(row: ManifestRow, timestamps_s: tuple[float, ...], source: SourceInfo) -> SampleMetadata:
    return SampleMetadata(
        key=sample_key(row.id),
        id=row.id,
        captions=row.captions,
        qa=row.qa,
        kind=row.kind,
        frame_timestamps_s=timestamps_s,
        source={"media": row.media, **asdict(source), "start_s": row.start_s, "end_s": row.end_s},
    )
