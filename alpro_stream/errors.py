"""Errors a user can act on: each message says what was found, what was expected, and what to do."""

from typing import Literal

Cause = Literal["truncated", "index", "metadata", "empty", "decode", "deadline", "crash"]
"""Why a sample cannot be used.

truncated: the tar ends inside it; index: the index does not fit the tar; metadata: its JSON is damaged; empty: no frame
or video, or no text of the kind asked for; decode: a decoder refuses it; deadline: decoding took too long; crash:
decoding ended the process it ran in.
"""


Fault = Literal["configuration", "data", "hardware", "bug"]
"""Where to look after an error, and whether the same command may succeed when it is given again.

configuration: what was asked for does not fit together; data: what is trained on; hardware: a machine, a process, a
disk or a network failed, is too slow or is taken, which may be gone at the next attempt; bug: everything else.
"""


class AlproError(Exception):
    """Base of every error that the command line prints without a traceback.

    Attributes:
        fault: where to look.
    """

    fault: Fault = "configuration"


class ConfigError(AlproError):
    """A configuration file or override that cannot be used."""


class ManifestError(AlproError):
    """A manifest that cannot be read at all (a single bad row is a rejected row, not an error)."""

    fault: Fault = "data"


class MediaError(AlproError):
    """A video or an image that gives no frames."""

    fault: Fault = "data"


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
        self.fault = "hardware" if transient else "data"


class ShardError(AlproError):
    """A shard, an index or a data set description that is missing, damaged or of another format."""

    fault: Fault = "data"


class WriteError(ShardError):
    """Shards that cannot be written: a full or broken disk, a folder that is not one's own."""

    fault: Fault = "hardware"


class DataError(AlproError):
    """A sample that cannot be turned into a batch; the message starts with ``shard:slot key``."""

    fault: Fault = "data"


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


class SaveError(CheckpointError):
    """A checkpoint that could not be written."""

    fault: Fault = "hardware"


class DivergenceError(AlproError):
    """A loss that is not a number, or has jumped."""

    fault: Fault = "data"


class ProcessError(AlproError):
    """A process that is gone, hangs or could not be started."""

    fault: Fault = "hardware"


class PrompterError(ProcessError):
    """The prompter process died or stalled."""


class TakenError(ProcessError):
    """A port or a folder that another process has; it may be one of an attempt before, which is still ending."""


class RankError(ProcessError):
    """Another rank is gone, or was not there in time."""


class OtherRankError(AlproError):
    """Another rank failed, and this one ends with it.

    Attributes:
        fault: of that rank's own error.
    """

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault
