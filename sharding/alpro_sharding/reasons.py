"""Failures counted by reason: what differs between rows that failed for the same reason is left out."""

import re
from collections import Counter
from collections.abc import Iterable

from alpro_sharding.results import Failure

# Addresses, numbers, ids and values (not the names of fields).
_VARIABLE_PART = re.compile(
    r"\b(?:https?|s3)://[^\s,;'\"]+|(?<=\b(?:id|is) )(?:'[^']*'|\"[^\"]*\")|(?<![-\w])-?\d+(\.\d+)?\b"
)
# Reasons beyond this many are counted together: what is counted must not grow with the corpus.
_MAX_REASONS = 2000
_OTHER = "other reasons"
_NUM_EXAMPLES = 3
_NUM_SHOWN = 10


class ReasonCounts:
    """How many rows failed for each reason, with some of them as examples."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], list[Failure]] = {}

    def add(self, failure: Failure) -> None:
        """Counts one."""
        reason = (failure.stage, _VARIABLE_PART.sub("…", failure.reason))
        if reason not in self._counts and len(self._counts) >= _MAX_REASONS:
            reason = (failure.stage, _OTHER)
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(failure)

    def ordered(self) -> list[tuple[str, str, int, tuple[Failure, ...]]]:
        """(stage, reason, count, examples), the most frequent first."""
        items = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return [(stage, reason, count, tuple(self._examples[stage, reason])) for (stage, reason), count in items]

    def by_text(self) -> dict[str, int]:
        """Counts by ``stage: reason``, the most frequent first."""
        return {f"{stage}: {reason}": count for stage, reason, count, _ in self.ordered()}


def count_reasons(failures: Iterable[Failure]) -> dict[str, int]:
    """Failures by stage and reason, the most frequent first."""
    counts = ReasonCounts()
    for failure in failures:
        counts.add(failure)
    return counts.by_text()


def describe_reasons(counts: dict[str, int]) -> str:
    """``3 x decode: ...; 1 x manifest: ...``, the rest summed up."""
    shown = list(counts.items())[:_NUM_SHOWN]
    parts = [f"{count} x {reason}" for reason, count in shown]
    rest = sum(counts.values()) - sum(count for _, count in shown)
    return "; ".join(parts + [f"{rest} for other reasons"] * (rest > 0))
