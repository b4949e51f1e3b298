"""Where the seconds of a step go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Seconds of a step, and how many of them were spent waiting for what."""

    def __init__(self) -> None:
        self._waits = {"data": 0.0, "prompter": 0.0}
        self.restart()

    def restart(self) -> None:
        """Begins a step now; used when something that is not training came between."""
        self._started = time.perf_counter()
        self._waits = dict.fromkeys(self._waits, 0.0)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Counts the time inside the `with` block as a wait for `data` or for the `prompter`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waits[what] += time.perf_counter() - started

    def lap(self, num_clips: int) -> dict[str, float]:
        """Figures of the step that ends now; begins the next."""
        seconds = time.perf_counter() - self._started
        waits = {f"{what}_wait_percent": 100 * wait / seconds for what, wait in self._waits.items()}
        self.restart()
        return {"step_s": seconds, "clips_per_s": num_clips / seconds, **waits}
