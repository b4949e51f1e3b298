"""Decoding in processes that can be killed: what hangs or crashes costs one sample, and the run goes on."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from alpro_stream.errors import Cause, ProcessError
from alpro_stream.media.killable import KillableProcess, wait_for, write_all
from alpro_stream.stream.isolated_process import (
    FrameChoice,
    LocateRequest,
    PicturesRequest,
    Request,
    decode_answer,
    encode_request,
)
from alpro_stream.stream.nvdec import LocatedVideo

__all__ = ["FrameChoice", "IsolatedDecoder", "IsolatedError", "Pictures"]

Pictures = list[NDArray[np.uint8]]
"""RGB, (height, width, 3) each."""

_PROCESS_MODULE = "alpro_stream.stream.isolated_process"
_START_S = 60.0
# A pause of the whole machine is no fault of the file: each gets a second chance in a fresh process. That has less
# time, so that a hang with the start of a process costs less than twice the deadline.
_DEADLINE_SHARES = (1.0, 0.75)


class IsolatedError(Exception):
    """Why a sample gave no pixels.

    Attributes:
        cause: ``decode`` (refused), ``deadline`` (took too long) or ``crash`` (ended its process).
        reason: what was found, in a sentence.
    """

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause: Cause = cause
        self.reason = reason


class IsolatedDecoder:
    """Decodes untrusted samples in processes beside this one; each that hangs or crashes is killed and replaced.

    To be called from one thread at a time. The processes start when they are first needed, and end with the thread
    that first called; another thread's call starts new ones.

    Args:
        num_processes: samples decoded at the same time.
        deadline_s: longest time of one sample, counted from when a running process has it.
        memory_mb: most memory of a process (data segment, in MiB); beyond it, allocations fail.
    """

    def __init__(self, num_processes: int, deadline_s: float, memory_mb: int = 2048) -> None:
        self._deadline_s = deadline_s
        self._processes = [_Process(memory_mb) for _ in range(num_processes)]

    def try_pictures(self, samples: Sequence[Sequence[bytes]]) -> list[IsolatedError | None]:
        """Decodes pictures on trial, to find the samples that cannot be decoded.

        Args:
            samples: the pictures of each.

        Returns:
            For each sample what is wrong with it; a truncated picture is refused.

        Raises:
            AlproError: no process can be started.
        """
        jobs = [_Job(pictures, PicturesRequest(tuple(map(len, pictures)), False)) for pictures in samples]
        self._run(jobs)
        return [job.error for job in jobs]

    def decode_pictures(self, samples: Sequence[Sequence[bytes]]) -> list[Pictures | IsolatedError]:
        """Decodes pictures of any kind that Pillow reads, at their own size.

        Args:
            samples: the pictures of each.

        Returns:
            For each sample its pixels, or what is wrong with it.

        Raises:
            AlproError: no process can be started.
        """
        jobs = [_Job(pictures, PicturesRequest(tuple(map(len, pictures)), True)) for pictures in samples]
        return self._results(jobs)

    def decode_videos(self, videos: Sequence[tuple[bytes, FrameChoice]]) -> list[Pictures | IsolatedError]:
        """Decodes stored videos.

        Args:
            videos: the bytes of each, and which frames are wanted.

        Returns:
            For each video the frames as a data set of frames would hold them, or what is wrong with it.

        Raises:
            AlproError: no process can be started.
        """
        return self._results([_Job((video,), choice) for video, choice in videos])

    def locate_videos(self, videos: Sequence[tuple[bytes, FrameChoice]]) -> list[LocatedVideo | IsolatedError]:
        """Finds the wanted frames of stored videos without decoding them; arguments and errors as in `decode_videos`.

        Returns:
            For each video where its frames are, or why that cannot be told.
        """
        jobs = [_Job((video,), LocateRequest(choice)) for video, choice in videos]
        self._run(jobs)
        return [cast(LocatedVideo, job.located) if job.error is None else job.error for job in jobs]

    def close(self) -> None:
        """Ends all processes and frees their buffers; may be called again."""
        for process in self._processes:
            process.close()

    def _results(self, jobs: Sequence["_Job"]) -> list[Pictures | IsolatedError]:
        self._run(jobs)
        return [job.pictures if job.error is None else job.error for job in jobs]

    def _run(self, jobs: Sequence["_Job"]) -> None:
        waiting = deque(jobs)
        try:
            while True:
                for process in self._processes:
                    if waiting and process.job is None:
                        process.begin(waiting.popleft(), self._deadline_s)
                busy = [process for process in self._processes if process.job is not None]
                if not busy:
                    return
                waiting.extendleft(self._listen(busy))
        finally:
            for process in self._processes:
                if process.job is not None:  # an error ended this call: nobody waits for the answer any more
                    process.end()

    def _listen(self, busy: Sequence["_Process"]) -> Iterator["_Job"]:
        """Waits until something happens to a process; gives the jobs that have to be tried again."""
        talking, late = wait_for(busy)
        for process in talking:
            try:
                process.receive(self._deadline_s)
            except ValueError as error:
                yield from process.give_up("crash", f"the process that decodes it gave a wrong answer ({error})")
            except (EOFError, OSError):
                yield from process.give_up("crash", f"the process that decodes it {process.how_it_ended()}")
        for process in late:
            limit = "" if process.is_starting else f" (deadline {self._deadline_s:g} s)"
            yield from process.give_up("deadline", f"it took more than {process.time_limit_s:g} s{limit}")


@dataclass(slots=True)
class _Job:
    """A sample to decode.

    Attributes:
        contents: its bytes, in parts.
        request: what to do with them.
        num_attempts: how often it was begun.
        pictures: what came back.
        located: what came back of a `LocateRequest`.
        error: why nothing did.
    """

    contents: Sequence[bytes]
    request: Request
    num_attempts: int = 0
    pictures: Pictures = field(default_factory=list)
    located: LocatedVideo | None = None
    error: IsolatedError | None = None

    @property
    def num_pictures(self) -> int:
        """How many are to come back."""
        if isinstance(self.request, PicturesRequest):
            return len(self.request.sizes) if self.request.wanted else 0
        return self.request.num_frames if isinstance(self.request, FrameChoice) else 0

    def fits(self, located: LocatedVideo | None) -> bool:
        """Whether that is what was asked for."""
        if not isinstance(self.request, LocateRequest):
            return located is None
        return located is not None and len(located.frames) == self.request.choice.num_frames


class _Process(KillableProcess):
    """One process, its buffer, and the job it has."""

    def __init__(self, memory_mb: int) -> None:
        # Memory with a descriptor: a process gets it when it starts, and it is gone when both have ended.
        self._buffer = open(os.memfd_create("alpro-isolated"), "r+b", buffering=0)  # noqa: SIM115, PTH123
        super().__init__(_PROCESS_MODULE, (self._buffer.fileno(),), str(memory_mb).encode())
        self.job: _Job | None = None
        self.is_starting = False

    def begin(self, job: _Job, deadline_s: float) -> None:
        """Hands a job over; a process that has died meanwhile is replaced."""
        self._buffer.seek(0)
        self._buffer.truncate(0)
        for part in job.contents:
            write_all(self._buffer.fileno(), part)
        self.job = job
        job.num_attempts += 1
        self.is_starting = self.send(encode_request(job.request))
        self._allow(deadline_s)

    def receive(self, deadline_s: float) -> None:
        """Takes in what it says, be it that it has started or the answer to its job.

        Raises:
            EOFError, OSError: it died.
            ValueError: it gives other pictures than were asked for, or fewer pixels than it says.
        """
        job = self.job
        assert job is not None
        said = self.connection.recv_bytes()
        if self.is_starting:
            self.is_starting = False
            self._allow(deadline_s)
            return
        answer = decode_answer(said)
        if answer.reason:
            job.error = IsolatedError("decode", answer.reason)
        else:
            if len(answer.sizes) != job.num_pictures or not job.fits(answer.located):
                raise ValueError("not what was asked for")
            job.located = answer.located
            job.pictures = self._pictures(answer.sizes)
        self.job = None
        self._buffer.truncate(0)  # between calls it holds no memory

    def _pictures(self, sizes: Sequence[tuple[int, int]]) -> Pictures:
        # Compared before memory is taken: who says it is not trusted.
        if sum(3 * height * width for height, width in sizes) > os.fstat(self._buffer.fileno()).st_size:
            raise ValueError("pixels are missing")
        pictures, position = [], 0
        for height, width in sizes:
            picture = np.empty((height, width, 3), np.uint8)
            position += os.preadv(self._buffer.fileno(), [picture.data], position)
            pictures.append(picture)
        return pictures

    def give_up(self, cause: Cause, reason: str) -> list[_Job]:
        """Kills it; its job once more if that has another chance.

        Raises:
            AlproError: it did not even start, and neither did the one before.
        """
        job, self.job = self.job, None
        assert job is not None
        self.end()
        if job.num_attempts < len(_DEADLINE_SHARES):
            return [job]
        if self.is_starting:  # every sample would end like this one, and be taken for a bad one
            raise ProcessError(f"a process for decoding could not be started: {reason}; what it said itself is above")
        job.error = IsolatedError(cause, f"{reason}, {job.num_attempts} times")
        return []

    def end(self) -> None:
        """Kills it, and forgets its job."""
        super().end()
        self.job = None

    def close(self) -> None:
        """Kills it for good."""
        self.end()
        self._buffer.close()

    def _allow(self, deadline_s: float) -> None:
        assert self.job is not None
        self.allow(_START_S if self.is_starting else deadline_s * _DEADLINE_SHARES[self.job.num_attempts - 1])
