"""What a rank does at the moment, for those who ask because nothing moves."""

import time


class Stage:
    """The stage that this rank is at; set by the main thread, read by others.

    Attributes:
        now: its name, to be read after "at", and since when on the monotonic clock.
    """

    def __init__(self) -> None:
        self.now: tuple[str, float] = ("the start", time.monotonic())

    def enter(self, name: str) -> None:
        """Begins a stage; the one before is over."""
        self.now = (name, time.monotonic())

    def __str__(self) -> str:
        name, since = self.now
        return f"{name}, for {time.monotonic() - since:.0f} s"
