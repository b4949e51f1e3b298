"""Stored frames decoded by libjpeg-turbo in processes beside this one: they share memory with it, and no lock.

While they decode a batch, this process reads the next one and the step goes on, each with an interpreter of its own.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alpro_stream.errors import Cause, ProcessError
from alpro_stream.media.killable import KillableProcess, wait_for
from alpro_stream.stream.decode import FrameDecoder, FrameError, FrameRequest
from alpro_stream.stream.reused import ReusedMemory
from alpro_stream.stream.view import pixel_window
from alpro_stream.stream.worker_process import Share, SharedFrame, decode_answer, encode_request, encode_share

_MODULE = "alpro_stream.stream.worker_process"
_START_S = 60.0
_MOST_FAILED_STARTS = 3
# Two keep it busy: it works on one while the other is on its way.
_MOST_SENT = 2


class TurboWorkers(FrameDecoder):
    """The pixels of `decode_frame`, made in processes that start with the first call.

    A process that ends or stays silent is replaced. Frames of the share that it had are decoded again, one by one, so
    that only what ends a process twice is lost. The processes end with the thread that called first; the next call
    starts others. To be called from one thread at a time.

    Args:
        num_workers: processes.
        deadline_s: longest time of a share of a call.
    """

    device = torch.device("cpu")
    needs_trial = False

    def __init__(self, num_workers: int, deadline_s: float) -> None:
        self._memory = ReusedMemory(shared=True)
        self._workers = [_Worker(self._memory, deadline_s) for _ in range(num_workers)]

    def empty(self, shape: Sequence[int]) -> Tensor:
        """See `FrameDecoder.empty`."""
        return self._memory.empty(shape)

    def start(
        self, requests: Sequence[FrameRequest], out_NHWC: Tensor, rows: Sequence[int]
    ) -> Callable[[], dict[int, FrameError]]:
        """See `FrameDecoder.start`.

        Raises:
            ValueError: `out_NHWC` is no memory of `empty`.
            AlproError: no process can be started; also raised by what waits for the end.
        """
        if not requests:
            return dict
        (pixels, first), (jpegs, starts) = self._memory.place_of(out_NHWC), self._written(requests)
        frame_bytes, image_size = out_NHWC[0].nbytes, out_NHWC.shape[1]
        frames = [
            SharedFrame(number, start, len(one.jpeg), one.width, one.height, one.view, first + row * frame_bytes)
            for number, (one, start, row) in enumerate(zip(requests, starts, rows, strict=True))
        ]
        call = _Call((jpegs, out_NHWC))

        def finish() -> dict[int, FrameError]:
            while call.num_shares:
                self._listen(call)
            return call.errors

        call.waiter = weakref.ref(finish)
        region, _ = self._memory.place_of(jpegs)
        num_workers = len(self._workers)
        for number, worker in enumerate(self._workers):
            own = frames[number * len(frames) // num_workers : (number + 1) * len(frames) // num_workers]
            if own:
                worker.give(Share(region, pixels, image_size, _resizes(own, image_size), tuple(own)), call)
        return finish

    def close(self) -> None:
        """Ends the processes; may be called again."""
        for worker in self._workers:
            worker.end()
        self._memory.close()

    def _written(self, requests: Sequence[FrameRequest]) -> tuple[Tensor, list[int]]:
        """The stored bytes where the workers see them, and where each frame's begin."""
        jpegs = self._memory.empty([max(1, sum(len(one.jpeg) for one in requests))])
        room, starts, position = jpegs.numpy().data, [], 0
        for one in requests:
            starts.append(position)
            position += len(one.jpeg)
            room[starts[-1] : position] = one.jpeg
        return jpegs, starts

    def _listen(self, call: "_Call") -> None:
        """Waits until something happens to a worker that has a share of this call."""
        workers = [worker for worker in self._workers if worker.works_on(call)]
        if not workers:
            raise ProcessError(
                "frames were not decoded: their decoder is closed, or its processes could not be started"
            )
        talking, late = wait_for(workers)
        for worker in talking:
            try:
                worker.receive()
            except ValueError as error:
                worker.begin_again("crash", f"gave a wrong answer ({error})")
            except (EOFError, OSError):
                worker.begin_again("crash", worker.how_it_ended())
        for worker in late:
            worker.begin_again("deadline", f"took more than {worker.time_limit_s:g} s")


def _resizes(frames: Sequence[SharedFrame], image_size: int) -> bool:
    windows = (pixel_window(one.view.window, one.width, one.height) for one in frames)
    return any((width, height) != (image_size, image_size) for _, _, width, height in windows)


def _nobody() -> None:
    return None


@dataclass(slots=True, eq=False)
class _Call:
    """A call whose shares are with the workers.

    Attributes:
        memory: what they read and write, kept for as long as they may.
        waiter: gives what waits for the end, None once nobody can any more.
        num_shares: that are not answered.
        errors: what is wrong with requests, by number.
    """

    memory: tuple[Tensor, Tensor]
    waiter: Callable[[], object] = _nobody
    num_shares: int = 0
    errors: dict[int, FrameError] = field(default_factory=dict)


@dataclass(slots=True)
class _Given:
    """A share that a worker has.

    Attributes:
        share: the frames.
        call: of which it is a part.
        description: the share as the process finds it.
        num_ends: how often it ended a process.
        is_sent: whether the process was told.
    """

    share: Share
    call: _Call
    description: Tensor
    num_ends: int = 0
    is_sent: bool = False


class _Worker(KillableProcess):
    """One process and the shares that it has not answered, oldest first."""

    def __init__(self, memory: ReusedMemory, deadline_s: float) -> None:
        super().__init__(_MODULE, (memory.descriptor,), b"")
        self._memory = memory
        self._deadline_s = deadline_s
        self._given: dict[int, _Given] = {}
        self._num_given = 0
        # Words that say that it has started, or loaded what resizing takes.
        self._num_words_due = 0
        self._has_loaded = self._has_started = False
        self._num_failed_starts = 0

    def works_on(self, call: _Call) -> bool:
        """Whether it has a share of the call."""
        return any(given.call is call for given in self._given.values())

    def give(self, share: Share, call: _Call) -> None:
        """Hands a share over, after those that it has."""
        call.num_shares += 1
        self._add(share, call)
        if not self.is_running:
            self._forget_process()
        self._send_some()

    def receive(self) -> None:
        """Takes in what it says, be it a word or an answer.

        Raises:
            EOFError, OSError: it died.
            ValueError: an answer to nothing that was asked.
        """
        said = self.connection.recv_bytes()
        if said:
            number, errors = decode_answer(said)
            given = self._given.get(number)
            if given is None or not errors.keys() <= {frame.number for frame in given.share.frames}:
                raise ValueError("not what was asked for")
            del self._given[number]
            self._answered(given, {of: FrameError("decode", reason) for of, reason in errors.items()})
        else:
            self._num_words_due -= 1
            self._has_started, self._num_failed_starts = True, 0
        self._count_time()
        self._send_some()

    def begin_again(self, cause: Cause, reason: str) -> None:
        """Ends the process, and gives its shares to another one; the one that it worked on in single frames.

        Raises:
            AlproError: several did not even start.
        """
        super().end()
        if not self._has_started:
            self._num_failed_starts += 1
            if self._num_failed_starts >= _MOST_FAILED_STARTS:
                self.end()
                raise ProcessError(
                    f"a process for decoding could not be started, it {reason}; what it said itself is above"
                )
        else:
            self._blame(next(iter(self._given.values())), cause, reason)
        self._forget_process()
        self._send_some()

    def end(self) -> None:
        """Kills it, and forgets its shares."""
        super().end()
        self._given.clear()

    def _blame(self, given: _Given, cause: Cause, reason: str) -> None:
        given.num_ends += 1
        if len(given.share.frames) > 1:
            later, self._given = self._given, {}
            for frame in given.share.frames:
                self._add(given.share._replace(frames=(frame,)), given.call)
            number = next(iter(later))
            self._given |= {of: one for of, one in later.items() if of != number}
            given.call.num_shares += len(given.share.frames) - 1
        elif given.num_ends == 2:
            del self._given[next(iter(self._given))]
            error = FrameError(cause, f"the process that decodes it {reason}, twice")
            self._answered(given, {given.share.frames[0].number: error})

    def _add(self, share: Share, call: _Call) -> None:
        data = encode_share(share)
        description = self._memory.empty([len(data)])
        description.numpy().data[:] = data
        self._num_given += 1
        self._given[self._num_given] = _Given(share, call, description)

    def _forget_process(self) -> None:
        """There is none, or it has ended: it writes nowhere any more, and whoever waits needs another one."""
        super().end()
        self._given = {of: one for of, one in self._given.items() if one.call.waiter() is not None}
        for given in self._given.values():
            given.is_sent = False

    def _send_some(self) -> None:
        """Tells the process of no more shares than its connection surely holds: sending must not block."""
        num_sent = sum(given.is_sent for given in self._given.values())
        for number, given in self._given.items():
            if given.is_sent:
                continue
            if num_sent == _MOST_SENT:
                return
            region, _ = self._memory.place_of(given.description)
            if self.send(encode_request(number, region, given.description.nbytes)):
                self._num_words_due, self._has_started, self._has_loaded = 1, False, False
            if given.share.resizes and not self._has_loaded:
                self._num_words_due += 1
                self._has_loaded = True
            given.is_sent = True
            num_sent += 1
            if num_sent == 1:
                self._count_time()

    def _count_time(self) -> None:
        self.allow(_START_S + self._deadline_s if self._num_words_due else self._deadline_s)

    @staticmethod
    def _answered(given: _Given, errors: dict[int, FrameError]) -> None:
        given.call.errors.update(errors)
        given.call.num_shares -= 1
