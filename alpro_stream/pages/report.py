"""What the page of a run shows, as plain values: no tensors, no files, no markup."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyNumbers:
    """The run in numbers; None is shown as "not measured"."""

    num_clips: int
    num_images: int
    num_frames: int
    num_shards: int
    num_entities: int
    num_parameters: int
    num_steps: int
    clips_per_s: float | None
    """Clips trained a second, over the whole of the training."""
    data_wait: float | None
    """Share of the training time spent waiting for data, 0 to 1."""
    prompter_wait: float | None
    """Share of the training time spent waiting for the soft labels, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Wall-clock time of one stage."""

    name: str
    seconds: float
    detail: str = ""
    """Shown beside the time, for example "done earlier"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalScore:
    """How well one score (VTC, VTM) ranks the candidates; recalls are fractions, ranks start at 1."""

    name: str
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalTable:
    """One direction of retrieval; the chance level follows from the two counts."""

    title: str
    """For example "Text to video"."""
    num_queries: int
    num_candidates: int
    num_right: int = 1
    """Right answers among the candidates of one query."""
    scores: tuple[RetrievalScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """A series over training steps; values that are not finite become gaps and are counted."""

    name: str
    """For example "VTC"."""
    stage: str
    """Which training it belongs to, for example "Prompter" or "ALPRO"."""
    steps: tuple[int, ...]
    values: tuple[float, ...]
    description: str = ""
    reference: float | None = None
    """A level worth comparing with, drawn as a dashed line: for a loss, what guessing gives."""
    reference_label: str = "guessing"
    smooth: bool = True
    """False for a series without noise, such as the learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle in fractions of the frame, from its top left corner."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityProbability:
    """One entity of the prompter and its soft label."""

    word: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipExample:
    """A clip as the model saw it, and what the prompter said of its crop."""

    id: str
    caption: str
    frames: tuple[bytes, ...]
    """JPEG or PNG files, in time order, cropped and flipped as in training."""
    box: Box
    """The PEM crop, in fractions of these frames."""
    entities: tuple[EntityProbability, ...]
    """The best entities, most probable first."""
    kept: bool
    """Whether the prompter was sure enough for this sample to count in the PEM loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedClip:
    """One clip in the answer to a caption."""

    rank: int
    """From 1."""
    id: str
    thumbnail: bytes
    """JPEG or PNG file."""
    score: float
    is_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchExample:
    """A caption and the clips that were retrieved for it."""

    caption: str
    score_name: str
    """For example "VTM probability"."""
    results: tuple[RankedClip, ...]
    """In rank order; the right clip may follow as a last entry with its own, later rank."""
    right_rank: int
    num_candidates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedInput:
    """A row of the manifest that gave no sample."""

    line: int | None
    id: str | None
    stage: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line and what it does."""

    text: str
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The resolved configuration of one stage, as YAML text."""

    name: str
    yaml: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything on the page of a run, in the order in which it is shown."""

    title: str
    summary: str
    """One sentence."""
    created: str
    """Date and time as they are to be shown."""
    note: str
    """What the numbers do not say; shown above all of them."""
    numbers: KeyNumbers
    stages: tuple[StageTime, ...] = ()
    retrieval: tuple[RetrievalTable, ...] = ()
    curves: tuple[LossCurve, ...] = ()
    clips: tuple[ClipExample, ...] = ()
    pem_threshold: float = 0.2
    """Least probability of the best entity for a sample to be kept."""
    searches: tuple[SearchExample, ...] = ()
    rejected: tuple[RejectedInput, ...] = ()
    commands: tuple[Command, ...] = ()
    """How to do the same on one's own videos."""
    configs: tuple[RunConfig, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package names and their versions."""
