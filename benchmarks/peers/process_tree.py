"""What this process and its workers use, and how the workers are paused between two samples."""

import signal
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over this process and its workers, since each was started."""

    cpu_s: float
    read_bytes: int
    """By read calls, from the page cache too; not what is mapped into memory."""


class ProcessTree:
    """This process and those it has started by now, which are expected to live as long as it does."""

    def __init__(self) -> None:
        this = psutil.Process()
        self.workers = this.children(recursive=True)
        self.all = [this, *self.workers]

    def usage(self) -> Usage:
        """What all have used until now."""
        times = [process.cpu_times() for process in self.all]
        read_bytes = sum(process.io_counters().read_chars for process in self.all)
        return Usage(sum(time.user + time.system for time in times), read_bytes)

    def peak_memory_bytes(self) -> int:
        """Sum of the peaks of all processes; pages that they share are counted in each."""
        lines = [line for p in self.all for line in Path(f"/proc/{p.pid}/status").read_text().splitlines()]
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    def pause_workers(self) -> None:
        """Stops them where they are."""
        for process in self.workers:
            process.send_signal(signal.SIGSTOP)

    def resume_workers(self) -> None:
        """Lets them go on; one that has ended is passed over."""
        for process in self.workers:
            if process.is_running():
                process.send_signal(signal.SIGCONT)
