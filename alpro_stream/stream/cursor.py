"""The state of the stream, and the proof that it is read by the run that wrote it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alpro_stream.config import differences
from alpro_stream.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of a run: the optimizer steps that were committed (not the batches that were fetched)."""

    step: int

    def to_dict(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cursor":
        """Reads what `to_dict` wrote."""
        return cls(step=int(values["step"]))


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Refuses to go on with other data or another model than the run began with.

    Raises:
        CheckpointError: lists every value that differs, saved against current.
    """
    changed = differences(dict(saved), dict(current))
    if changed:
        raise CheckpointError(
            f"{where} was written by another run (saved != now): {'; '.join(changed)}. Set these back, "
            "or start a new run in another directory"
        )
