"""Being asked to end: SIGTERM, as schedulers send it before they take a machine away."""

import signal
from types import FrameType

EXIT_PREEMPTED = 75
"""Status of a process that was asked to end and has saved: EX_TEMPFAIL of sysexits.h, try again later."""


class StopRequest:
    """Notes SIGTERM; a second one ends the process at once. To be made in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
