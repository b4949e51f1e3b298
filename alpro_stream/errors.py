"""Errors a user can act on: each message says what was found, what was expected, and what to do."""


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


class PlanError(AlproError):
    """An order that cannot be made: too few samples, ranks that do not divide the lanes."""


class TokenizerError(AlproError):
    """A tokenizer that is missing or does not fit the model."""


class CheckpointError(AlproError):
    """A checkpoint that is missing, incomplete or belongs to another run."""


class PrompterError(AlproError):
    """The prompter process died, stalled or does not fit the run."""
