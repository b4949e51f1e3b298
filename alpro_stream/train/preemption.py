"""Being asked to end: SIGTERM, as schedulers send it before they take a machine away, or a file."""

import ctypes
import signal
import threading
import time
from pathlib import Path
from queue import SimpleQueue

STOP_FILE = "stop"
"""In the folder of a run: where no signal reaches the ranks, such as through the launcher of deepspeed."""
# A scheduler that signals all processes of a job, and the launcher that hands it on, ask for one and the same.
_ONE_REQUEST_S = 5.0


class StopRequest:
    """Notes SIGTERM, and looks for a file. To be made in the main thread.

    Repeats within 5 s are the same request; a SIGTERM after that ends the process at once.

    Args:
        file: whose being there is a request too; None looks for none.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._noted = False
        self._file = file
        # A handler may interrupt itself, which of the ways to wake a thread only this one allows.
        self._signals: SimpleQueue[int] = SimpleQueue()
        signal.signal(signal.SIGTERM, self._note)
        threading.Thread(target=self._end_at_a_later_one, name="alpro-stop-request", daemon=True).start()

    @property
    def asked(self) -> bool:
        """Whether this process is asked to end."""
        return self._noted or (self._file is not None and self._file.exists())

    def settle(self) -> None:
        """Removes the file: what it asked for was done."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, _: object) -> None:
        self._noted = True
        self._signals.put(number)

    def _end_at_a_later_one(self) -> None:
        number = self._signals.get()
        time.sleep(_ONE_REQUEST_S)
        # Of the system and not of Python, whose handlers wait while the main thread is in a collective.
        ctypes.CDLL(None).signal(number, None)  # SIG_DFL
