"""HTML pages: plain data in, one self-contained file out."""

from alpro_stream.pages.render import render_report
from alpro_stream.pages.report import (
    Box,
    ClipExample,
    Command,
    EntityProbability,
    KeyNumbers,
    LossCurve,
    RankedClip,
    RejectedInput,
    ReportData,
    RetrievalScore,
    RetrievalTable,
    RunConfig,
    SearchExample,
    StageTime,
)

__all__ = [
    "Box",
    "ClipExample",
    "Command",
    "EntityProbability",
    "KeyNumbers",
    "LossCurve",
    "RankedClip",
    "RejectedInput",
    "ReportData",
    "RetrievalScore",
    "RetrievalTable",
    "RunConfig",
    "SearchExample",
    "StageTime",
    "render_report",
]
