"""What the page and the card of a shard set show, as plain values: no arrays, no files, no markup."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from alpro_stream.pages.report import Command, RejectedInput, StageTime


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """One split of the shard set in numbers."""

    name: str
    num_samples: int
    num_captions: int
    num_questions: int
    num_shards: int
    num_bytes: int
    """Size of its tars."""
    digest: str
    """Digest of the split as in ``dataset.json``; empty if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Rows that gave no sample for one and the same reason."""

    stage: str
    """For example "decode"."""
    reason: str
    """The reason as rows share it, without what differs between them."""
    count: int
    examples: tuple[RejectedInput, ...] = ()
    """Some of these rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often values lie in each bin."""

    title: str
    unit: str
    """For example "s" or "frames"."""
    edges: tuple[float, ...]
    """One more than there are bins, ascending; the first may be minus infinity, the last infinity."""
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            found = f"{len(self.edges)} edges for {len(self.counts)} bins"
            raise ValueError(f"histogram {self.title!r} has {found}; expected one edge more than there are bins")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSheet:
    """A sample with the frames it stores, small."""

    key: str
    split: str
    caption: str
    frames: tuple[bytes, ...]
    """JPEG or PNG files in time order, at most eight of them are shown."""
    detail: str = ""
    """For example "12.4 s, 38 frames, h264 640x360"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRate:
    """What one worker did."""

    host: str
    num_shards: int
    num_samples: int
    seconds: float
    samples_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReportData:
    """Everything on the page of a shard set, in about the order in which it is shown."""

    title: str
    summary: str
    """One sentence."""
    created: str
    """Date and time as they are to be shown."""
    num_rows: int
    """Rows of the manifest."""
    num_samples: int
    num_rejected: int
    num_shards: int
    num_bytes: int
    num_duplicate_media: int = 0
    """Samples whose media equal those of an earlier sample; they are in the shards."""
    num_duplicate_captions: int = 0
    """Samples whose captions equal those of an earlier sample; they are in the shards."""
    splits: tuple[SplitCounts, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    """Shown most frequent first."""
    histograms: tuple[Histogram, ...] = ()
    codecs: tuple[tuple[str, int], ...] = ()
    """Names and numbers of samples, shown most frequent first."""
    samples: tuple[SampleSheet, ...] = ()
    entities: tuple[tuple[str, int], ...] = ()
    """Nouns and how often they occur; only the most frequent need be here."""
    num_entities: int = 0
    """Nouns in the vocabulary."""
    workers: tuple[WorkerRate, ...] = ()
    stages: tuple[StageTime, ...] = ()
    """Time of downloading, decoding, writing, summed over all workers."""
    licenses: tuple[tuple[str, int], ...] = ()
    """Licence texts of the manifest and numbers of samples; an empty text means that none was stated."""
    config: str = ""
    """The resolved configuration as YAML text."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package names and their versions."""
    commands: tuple[Command, ...] = ()
    """How to retry failures, verify the shards, leave out duplicates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetCard:
    """Everything in the card of a shard set; nothing here may differ between two runs of the same job."""

    title: str
    payload: str
    """What a sample holds: "frames" or "video"."""
    format_version: int
    """Version of the shard format."""
    splits: tuple[SplitCounts, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    """How the media became what is stored, for example {"fps": "3.0"}."""
    manifests: tuple[str, ...] = ()
    """Names of the files the rows came from."""
    sources: tuple[tuple[str, int], ...] = ()
    """Where media came from ("local", "https://host", "s3://bucket") and numbers of samples."""
    licenses: tuple[tuple[str, int], ...] = ()
    """Licence texts of the manifest and numbers of samples; an empty text means that none was stated."""
    entities: tuple[tuple[str, int], ...] = ()
    """Nouns and how often they occur; only the most frequent need be here."""
    num_entities: int = 0
    """Nouns in the vocabulary."""
    contact: str | None = None
    """Whom to ask for removal, for example an e-mail address."""
