"""The page and the card of a shard set: gathers what they show."""

import io
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from alpro_sharding.config import ShardConfig
from alpro_sharding.describe import DUPLICATE_CAPTIONS_FILE, DUPLICATE_MEDIA_FILE, Account
from alpro_sharding.entities import vocabulary
from alpro_sharding.filters import FilterConfig
from alpro_sharding.media_messages import LimitConfig, MediaAnswer, MediaFailure, MediaOptions, MediaRequest
from alpro_sharding.media_pool import MediaPool
from alpro_sharding.results import Work
from alpro_stream.config import to_yaml
from alpro_stream.media import FetchConfig, FrameConfig, VideoConfig
from alpro_stream.pages import (
    Command,
    DatasetCard,
    Histogram,
    RejectedInput,
    Rejection,
    SampleSheet,
    ShardReportData,
    SplitCounts,
    StageTime,
    WorkerRate,
    render_dataset_card,
    render_shard_report,
)
from alpro_stream.pages.numbers import duration
from alpro_stream.shards import FORMAT_VERSION, DatasetInfo, ShardReader
from alpro_stream.shards.entities import Entities
from alpro_stream.shards.layout import tar_path
from alpro_stream.shards.sample import is_video
from alpro_stream.shards.storage import publish_bytes

REPORT_FILE = "report.html"
CARD_FILE = "README.md"
_NUM_SHEETS = 12
_FRAMES_OF_SHEET = 8
_SHEET_SIZE = 112
_SHEET_QUALITY = 80
_SHEET_S = 30.0
_NUM_ENTITIES = 100
_PACKAGES = ("alpro-stream", "av", "numpy", "pillow", "ray", "textblob", "simplemma")


def write_pages(config: ShardConfig, out: Path, account: Account) -> Path:
    """Writes ``report.html`` and ``README.md`` into the folder of a shard set; gives the path of the report.

    The report names machines and times; the card depends on the shards alone.

    Raises:
        ShardError: a shard cannot be read.
        ConfigError: the file of the entity vocabulary cannot be used.
        OSError: the folder cannot be written.
    """
    splits = tuple(_split_counts(name, info) for name, info in account.splits.items())
    entities = vocabulary(account.nouns, config.entities)
    report = _report(config, out, account, splits, entities)
    publish_bytes(out / REPORT_FILE, render_shard_report(report).encode("utf-8"))
    publish_bytes(out / CARD_FILE, render_dataset_card(_card(config, account, splits, entities)).encode("utf-8"))
    return out / REPORT_FILE


def _report(
    config: ShardConfig, out: Path, account: Account, splits: tuple[SplitCounts, ...], entities: Entities
) -> ShardReportData:
    statistics = account.statistics
    manifests = ", ".join(part.manifest for part in account.parts)
    return ShardReportData(
        title=out.name,
        summary=f"{account.num_samples:,} samples from {account.num_rows:,} rows of {manifests}.",
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        num_rows=account.num_rows,
        num_samples=account.num_samples,
        num_rejected=account.num_failures,
        num_shards=sum(len(info.shards) for info in account.splits.values()),
        num_bytes=sum(info.num_bytes for info in account.splits.values()),
        num_duplicate_media=account.num_duplicate_media,
        num_duplicate_captions=account.num_duplicate_captions,
        splits=splits,
        rejections=tuple(
            Rejection(
                stage=stage,
                reason=reason,
                count=count,
                examples=tuple(
                    RejectedInput(line=failure.line, id=failure.id, stage=failure.stage, reason=failure.reason)
                    for failure in examples
                ),
            )
            for stage, reason, count, examples in account.reasons.ordered()
        ),
        histograms=tuple(
            Histogram(title=title, unit=unit, edges=edges, counts=counts)
            for title, unit, edges, counts in statistics.histograms()
        ),
        codecs=tuple(statistics.codecs.most_common()),
        samples=tuple(_sheets(out, account)),
        entities=tuple(entities[:_NUM_ENTITIES]),
        num_entities=len(entities),
        workers=_workers(account.work),
        stages=_stages([work for _, work in account.work]),
        licenses=tuple(statistics.licenses.most_common()),
        config=to_yaml(config),
        versions=_versions(),
        commands=_commands(out, account),
    )


def _commands(out: Path, account: Account) -> tuple[Command, ...]:
    commands = [
        Command(text=f"alpro inspect {out}", explanation="what is planned, done and failed"),
        Command(text=f"alpro inspect {out} --verify", explanation="compares every shard with its digest"),
        Command(text="alpro shard CONFIG --retry-failed", explanation="tries rows again that gave no sample"),
    ]
    for count, file, what in (
        (account.num_duplicate_media, DUPLICATE_MEDIA_FILE, "media"),
        (account.num_duplicate_captions, DUPLICATE_CAPTIONS_FILE, "captions"),
    ):
        if count:
            explanation = f"one list a split: keys to leave out, whose {what} an earlier sample has too"
            commands.append(Command(text=f"cat {out}/*/{file}", explanation=explanation))
    return tuple(commands)


def _card(config: ShardConfig, account: Account, splits: tuple[SplitCounts, ...], entities: Entities) -> DatasetCard:
    options = config.sample_options()
    filters = {f"filters.{name}": value for name, value in options["filters"].items() if value is not None}
    shown = {**options[config.payload], **filters, "samples_per_shard": options["samples_per_shard"]}
    return DatasetCard(
        title=config.out_dir.name,
        payload=config.payload,
        format_version=FORMAT_VERSION,
        splits=splits,
        options={name: str(value) for name, value in shown.items()},
        manifests=tuple(part.manifest for part in account.parts),
        sources=tuple(sorted(account.statistics.places.items())),
        licenses=tuple(sorted(account.statistics.licenses.items())),
        entities=tuple(entities[:_NUM_ENTITIES]),
        num_entities=len(entities),
        contact=config.contact,
    )


def _split_counts(name: str, info: DatasetInfo) -> SplitCounts:
    return SplitCounts(
        name=name,
        num_samples=info.num_samples,
        num_captions=info.num_captions,
        num_questions=info.num_questions,
        num_shards=len(info.shards),
        num_bytes=info.num_bytes,
        digest=info.digest,
    )


def _workers(work: Sequence[tuple[int, Work]]) -> tuple[WorkerRate, ...]:
    """What each machine did; the rate is that of one worker on it."""
    shards: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for num_samples, done in work:
        shards[done.host] += 1
        samples[done.host] += num_samples
        seconds[done.host] = seconds.get(done.host, 0.0) + done.wall_s
    return tuple(
        WorkerRate(
            host=host,
            num_shards=shards[host],
            num_samples=samples[host],
            seconds=seconds[host],
            samples_per_s=samples[host] / seconds[host] if seconds[host] else 0.0,
        )
        for host in sorted(shards)
    )


def _stages(work: Sequence[Work]) -> tuple[StageTime, ...]:
    total = sum(done.fetch_s + done.decode_s + done.write_s + done.text_s for done in work) or 1.0
    names = {"fetch and hash": "fetch_s", "decode": "decode_s", "write": "write_s", "count nouns": "text_s"}
    times = {name: sum(getattr(done, field) for done in work) for name, field in names.items()}
    return tuple(
        StageTime(name=name, seconds=spent, detail=f"{100 * spent / total:.1f} %") for name, spent in times.items()
    )


def _sheets(out: Path, account: Account) -> Iterator[SampleSheet]:
    """Some samples, any equally likely; the same ones for the same shards."""
    readers = {split: ShardReader(out / split, info) for split, info in account.splits.items()}
    slots = _random_slots(account.splits)
    requests = ((place, _video_request(readers[place[0]], *place[1:])) for place in slots)
    # Stored videos are decoded in a process of its own: whatever is in them, the job has done its work and ends well.
    with MediaPool(_sheet_options(), 1) as pool:
        for (split, shard, slot), outcome in pool.outcomes(requests):
            if isinstance(outcome, MediaFailure):
                continue
            reader = readers[split]
            frames, detail = _stored_frames(reader, shard, slot) if outcome is None else _frames_of_video(outcome)
            metadata = reader.metadata(shard, slot)
            duration_s = metadata.source.get("duration_s")
            yield SampleSheet(
                key=metadata.key,
                split=split,
                caption=metadata.captions[0],
                frames=frames,
                detail=f"{duration(duration_s)}, {detail}" if duration_s else detail,
            )


def _sheet_options() -> MediaOptions:
    """How a stored video is shown: a few small key frames, and none at all if they take long."""
    return MediaOptions(
        payload="frames",
        frames=FrameConfig(
            fps=1, max_frames=_FRAMES_OF_SHEET, size=_SHEET_SIZE, quality=_SHEET_QUALITY, sampling="keyframes"
        ),
        video=VideoConfig(),
        filters=FilterConfig(),
        fetch=FetchConfig(),
        limits=LimitConfig(fetch_s=_SHEET_S, decode_s=_SHEET_S),
    )


def _video_request(reader: ShardReader, shard: str, slot: int) -> MediaRequest | None:
    """Asks for the frames of a stored video; None for a sample that stores frames."""
    for member in reader.index(shard).members(slot):
        if is_video(member.extension):
            place = str(tar_path(Path(reader.place), shard))
            return MediaRequest(place, (member.offset, member.size), "video", start_s=None, end_s=None)
    return None


def _frames_of_video(answer: MediaAnswer) -> tuple[tuple[bytes, ...], str]:
    """Frames and description of a stored video."""
    source = answer.source
    frames = tuple(member.read() for member in answer.members)
    return frames, f"stored video, {source.codec} {source.width}x{source.height}"


def _stored_frames(reader: ShardReader, shard: str, slot: int) -> tuple[tuple[bytes, ...], str]:
    """Frames and description of a sample that stores frames."""
    source, members = reader.metadata(shard, slot).source, reader.frame_members(shard, slot)
    frames = reader.read(shard, slot, members[:: max(1, -(-len(members) // _FRAMES_OF_SHEET))])
    count = "1 frame" if len(members) == 1 else f"{len(members)} frames"
    detail = f"{count}, {source.get('codec')} {source.get('width')}x{source.get('height')}"
    return tuple(map(_thumbnail, frames)), detail


def _random_slots(splits: dict[str, DatasetInfo]) -> list[tuple[str, str, int]]:
    """(split, shard, slot) of samples drawn without repetition, in their order."""
    shards = [(split, shard) for split, info in splits.items() for shard in info.shards]
    ends = np.cumsum([shard.num_samples for _, shard in shards])
    total = int(ends[-1])
    numbers = np.random.default_rng(total).choice(total, min(_NUM_SHEETS, total), replace=False)
    found = []
    for number in sorted(numbers.tolist()):
        place = int(np.searchsorted(ends, number, side="right"))
        split, shard = shards[place]
        found.append((split, shard.name, number - int(ends[place]) + shard.num_samples))
    return found


def _thumbnail(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
        image.thumbnail((_SHEET_SIZE, _SHEET_SIZE))
        image.save(buffer, "JPEG", quality=_SHEET_QUALITY)
    return buffer.getvalue()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # on a cluster this project itself is not installed
            continue
    return found
