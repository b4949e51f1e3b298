"""Errors a user can act on: each message says what was found, what was expected, and what to do."""

from typing import Literal

Cause = Literal["truncated", "index", "metadata", "empty", "decode", "deadline", "crash"]
"""Why a sample cannot be used.

truncated: the tar ends inside it; index: the index does not fit the tar; metadata: its JSON is damaged; empty: no frame
or video, or no text of the kind asked for; decode: a decoder refuses it; deadline: decoding took too long; crash:
decoding ended the process it ran in.
"""


class AlproError(Exception):
    """Base of every error that the command line prints without a traceback."""


class ConfigError(AlproError):
    """A configuration file or override that cannot be used."""


class ManifestError(AlproError):
    """A manifest that cannot be read at all (a single bad row is a rejected row, not an error)."""


class MediaError(AlproError):
    """A video or an image that gives no frames."""


class UnreadableError(MediaError):
    """A file that is not the medium it should be, found before anything is decoded."""


class FetchError(MediaError):
    """Media behind an address that could not be fetched.

    Attributes:
        transient: whether another attempt, later, may well succeed (throttled, cut off, timed out).
    """

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class ShardError(AlproError):
    """A shard, an index or a data set description that is missing, damaged or of another format."""


class DataError(AlproError):
    """A sample that cannot be turned into a batch; the message starts with ``shard:slot key``."""


class SampleError(DataError):
    """One stored sample that gives no pixels or no text; another one can take its place.

    Attributes:
        place: ``shard:slot key``.
        cause: a word to count by, see `Cause`.
        reason: what was found, in a sentence.
    """

    def __init__(self, place: str, cause: Cause, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place = place
        self.cause: Cause = cause
        self.reason = reason


class PlanError(AlproError):
    """An order that cannot be made: too few samples, ranks that do not divide the lanes."""


class TokenizerError(AlproError):
    """A tokenizer that is missing or does not fit the model."""


class CheckpointError(AlproError):
    """A checkpoint that is missing, incomplete or belongs to another run."""


class PrompterError(AlproError):
    """The prompter process died, stalled or does not fit the run."""
