"""What the page of a single training run shows, as plain values: no tensors, no files, no markup."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from alpro_stream.pages.report import ClipExample, LossCurve, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingNumbers:
    """Where a run has got to; None is shown as "not measured"."""

    num_steps: int
    """Steps of which there are metrics."""
    num_planned: int | None
    """Steps of the whole run."""
    seconds: float | None
    """Time spent in these steps, as far as it was measured."""
    clips_per_s: float | None
    """Clips trained a second, over all of them."""
    data_wait: float | None
    """Share of the training time spent waiting for data, 0 to 1."""
    prompter_wait: float | None
    """Share of the training time spent waiting for the soft labels, 0 to 1."""
    mfu: float | None
    """Share of the device's peak that was used, 0 to 1."""
    num_parameters: int | None
    num_ranks: int | None
    num_dropped: int
    """Times a planned sample could not be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedSample:
    """A sample that could not be used where the run met it."""

    step: int
    row: int
    """In the global batch."""
    place: str
    """Shard, slot and key."""
    reason: str
    substitute: str | None
    """What took its place; None where nothing did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedCause:
    """Samples dropped for one cause."""

    cause: str
    """For example "decode"."""
    count: int
    examples: tuple[DroppedSample, ...]
    """Some of them, latest last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A complete checkpoint of the run."""

    name: str
    written: str
    """Date and time as they are to be shown."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReportData:
    """Everything on the page of a single run, in about the order in which it is shown."""

    title: str
    summary: str
    """One sentence."""
    created: str
    """Date and time as they are to be shown."""
    numbers: TrainingNumbers
    bottleneck: str = ""
    """A sentence on what holds the training up."""
    losses: tuple[LossCurve, ...] = ()
    validation: tuple[LossCurve, ...] = ()
    """Left out when empty, as are `entities` and `top_entities`."""
    speed: tuple[LossCurve, ...] = ()
    """Waits, clips a second, use of the device."""
    optimizer: tuple[LossCurve, ...] = ()
    """Learning rate, norm of the gradient."""
    entities: tuple[LossCurve, ...] = ()
    """How sure the prompter is."""
    top_entities: str = ""
    """The entities it names most often, latest."""
    clips: tuple[ClipExample, ...] | None = None
    """None for a run without a prompter, whose page has no such section."""
    clips_note: str = ""
    """Why there are no clips."""
    pem_threshold: float = 0.2
    """Least probability of the best entity for a sample to be kept."""
    dropped: tuple[DroppedCause, ...] = ()
    """Shown most frequent first."""
    dropped_records: str = ""
    """Where all of them are listed."""
    checkpoints: tuple[SavedCheckpoint, ...] = ()
    configs: tuple[RunConfig, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package names and their versions."""
