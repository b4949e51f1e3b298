"""What a command's exit status says, so that a launcher or a scheduler can decide what to do; docs/training.md."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from alpro_stream.errors import AlproError, Fault

DATA: Final = 65
HARDWARE: Final = 69
BUG: Final = 70
PREEMPTED: Final = 75
"""The process was asked to end and has saved."""
CONFIGURATION: Final = 78
INTERRUPTED: Final = 130
# The numbers are those of sysexits.h: EX_DATAERR, EX_UNAVAILABLE, EX_SOFTWARE, EX_TEMPFAIL, EX_CONFIG.

STATUS: Mapping[Fault, int] = MappingProxyType(
    {"configuration": CONFIGURATION, "data": DATA, "hardware": HARDWARE, "bug": BUG}
)
_WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
# By name: torch takes seconds to import, and what only shards has none of it.
_DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError")


def fault_of(error: BaseException) -> Fault:
    """Where to look after an error of any class."""
    if isinstance(error, AlproError):
        return error.fault
    if isinstance(error, _WRONG_PATHS):
        return "configuration"
    if isinstance(error, OSError | MemoryError) or type(error).__name__ in _DEVICE_ERRORS:
        return "hardware"
    return "bug"


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends with an error."""
    return STATUS[fault_of(error)]
