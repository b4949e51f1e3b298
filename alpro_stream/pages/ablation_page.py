"""What the page of an ablation shows, as plain values: no files, no markup."""

from dataclasses import dataclass

from alpro_stream.pages.report import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadRow:
    """A row of a plot: its seeds, their mean and spread."""

    name: str
    values: tuple[float, ...]
    """Of the seeds."""
    mean: float | None
    """None where no seed gave a value."""
    sd: float | None
    """None with fewer than two seeds."""
    text: str
    """Mean and spread as they are to be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadPlot:
    """One measure of all rows."""

    name: str
    unit: str
    rows: tuple[SpreadRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A table whose cells are written out; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationPage:
    """Everything on the page of an ablation, in about the order in which it is shown."""

    title: str
    summary: str
    """One sentence."""
    created: str
    """Date and time as they are to be shown."""
    note: str
    """What the figures do not say; left out when empty."""
    figures: TextTable
    chosen: str
    """Which row was chosen, and by what; left out when empty."""
    missing: tuple[str, ...]
    """Means of fewer seeds than asked for, and why."""
    plots: tuple[SpreadPlot, ...]
    differences: TextTable
    """Of rows, seed by seed; without any there is no such section."""
    power_note: str
    """What the number of seeds needed means."""
    configs: tuple[RunConfig, ...] = ()
