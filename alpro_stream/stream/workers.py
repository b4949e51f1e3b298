"""Stored frames decoded by libjpeg-turbo in processes beside this one: they share memory with it, and no lock.

While they decode a batch, this process reads the next one and the step goes on, each with an interpreter of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alpro_stream.errors import AlproError
from alpro_stream.media.killable import KillableProcess, wait_for
from alpro_stream.stream.decode import FrameDecoder, FrameRequest
from alpro_stream.stream.reused import ReusedMemory
from alpro_stream.stream.worker_process import Share, SharedFrame, decode_answer, encode_share

_MODULE = "alpro_stream.stream.worker_process"
_START_S = 60.0


class TurboWorkers(FrameDecoder):
    """The pixels of `decode_frame`, made in processes that start with the first call.

    A process that ends or stays silent is replaced, and gets its frames once more: together, then one by one, so that
    only the frame that ends it is lost. The processes end with the thread that called first; the next call starts
    others. To be called from one thread at a time.

    Args:
        num_workers: processes.
        deadline_s: longest time of a share of a call, counted from when somebody waits for it.
    """

    device = torch.device("cpu")
    needs_trial = False

    def __init__(self, num_workers: int, deadline_s: float) -> None:
        self._memory = ReusedMemory(shared=True)
        self._workers = [_Worker(self._memory.descriptor, deadline_s) for _ in range(num_workers)]

    def empty(self, shape: Sequence[int]) -> Tensor:
        """See `FrameDecoder.empty`."""
        return self._memory.empty(shape)

    def start(
        self, requests: Sequence[FrameRequest], out_NHWC: Tensor, rows: Sequence[int]
    ) -> Callable[[], dict[int, str]]:
        """See `FrameDecoder.start`.

        Raises:
            ValueError: `out_NHWC` is no memory of `empty`.
        """
        if not requests:
            return dict
        (pixels, first), (jpegs, starts) = self._memory.place_of(out_NHWC), self._written(requests)
        frame_bytes = out_NHWC[0].nbytes
        frames = [
            SharedFrame(number, start, len(one.jpeg), one.width, one.height, one.view, first + row * frame_bytes)
            for number, (one, start, row) in enumerate(zip(requests, starts, rows, strict=True))
        ]
        call = _Call((jpegs, out_NHWC))
        region, _ = self._memory.place_of(jpegs)
        num_workers = len(self._workers)
        for number, worker in enumerate(self._workers):
            own = frames[number * len(frames) // num_workers : (number + 1) * len(frames) // num_workers]
            if own:
                worker.give(Share(0, region, pixels, out_NHWC.shape[1], tuple(own)), call)

        def finish() -> dict[int, str]:
            while call.num_shares:
                self._listen(call)
            return call.errors

        return finish

    def close(self) -> None:
        """Ends the processes; may be called again."""
        for worker in self._workers:
            worker.end()
        self._memory.close()

    def _written(self, requests: Sequence[FrameRequest]) -> tuple[Tensor, list[int]]:
        """The stored bytes where the workers see them, and where each frame's begin."""
        jpegs = self._memory.empty([sum(len(one.jpeg) for one in requests)])
        room, starts, position = jpegs.numpy().data, [], 0
        for one in requests:
            starts.append(position)
            position += len(one.jpeg)
            room[starts[-1] : position] = one.jpeg
        return jpegs, starts

    def _listen(self, call: "_Call") -> None:
        """Waits until something happens to a worker that has a share of this call."""
        talking, late = wait_for([worker for worker in self._workers if worker.works_on(call)])
        for worker in talking:
            try:
                worker.receive()
            except ValueError as error:
                worker.begin_again(f"gave a wrong answer ({error})")
            except (EOFError, OSError):
                worker.begin_again(worker.how_it_ended())
        for worker in late:
            worker.begin_again(f"took more than {worker.time_limit_s:g} s")


@dataclass(slots=True, eq=False)
class _Call:
    """A call whose shares are with the workers.

    Attributes:
        memory: what they read and write, kept for as long as they may.
        num_shares: that are not answered.
        errors: what is wrong with requests, by number.
    """

    memory: tuple[Tensor, Tensor]
    num_shares: int = 0
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Given:
    """A share that a worker has; how often it ended the worker."""

    share: Share
    call: _Call
    num_ends: int = 0


class _Worker(KillableProcess):
    """One process and the shares that it has not answered, oldest first."""

    def __init__(self, descriptor: int, deadline_s: float) -> None:
        super().__init__(_MODULE, (descriptor,), b"")
        self._deadline_s = deadline_s
        self._given: dict[int, _Given] = {}
        self._num_given = 0
        self._is_starting = False
        self._num_failed_starts = 0

    def works_on(self, call: _Call) -> bool:
        """Whether it has a share of the call."""
        return any(given.call is call for given in self._given.values())

    def give(self, share: Share, call: _Call) -> None:
        """Hands a share over, after those that it has."""
        call.num_shares += 1
        is_new = self._send(self._add(share, call))
        if is_new and len(self._given) > 1:  # it has none of those that the process before had
            self._send_all_anew()

    def receive(self) -> None:
        """Takes in what it says, be it that it has started or an answer.

        Raises:
            EOFError, OSError: it died.
            ValueError: an answer to nothing that was asked.
        """
        said = self.connection.recv_bytes()
        if self._is_starting:
            self._is_starting, self._num_failed_starts = False, 0
        else:
            number, errors = decode_answer(said)
            given = self._given.get(number)
            if given is None or not errors.keys() <= {frame.number for frame in given.share.frames}:
                raise ValueError("not what was asked for")
            del self._given[number]
            self._answered(given, errors)
        self.allow(self._deadline_s)

    def begin_again(self, reason: str) -> None:
        """Ends the process, and gives all of its shares to another; a share that ended two is taken apart.

        Raises:
            AlproError: several did not even start.
        """
        if self._is_starting:
            self._num_failed_starts += 1
            if self._num_failed_starts > 1:
                self.end()
                raise AlproError(
                    f"a process for decoding could not be started, it {reason}; what it said itself is above"
                )
        else:
            self._blame(next(iter(self._given.values())), reason)
        self._send_all_anew()

    def end(self) -> None:
        """Kills it, and forgets its shares."""
        super().end()
        self._given.clear()

    def _blame(self, given: _Given, reason: str) -> None:
        given.num_ends += 1
        if given.num_ends < 2:
            return
        del self._given[given.share.number]
        if len(given.share.frames) == 1:
            self._answered(given, {given.share.frames[0].number: f"the process that decodes it {reason}, twice"})
            return
        # Each frame has one more try: what is left of the shares in front stays in front.
        later, self._given = self._given, {}
        for frame in given.share.frames:
            self._add(given.share._replace(frames=(frame,)), given.call)
        self._given |= later
        given.call.num_shares += len(given.share.frames) - 1

    def _add(self, share: Share, call: _Call) -> _Given:
        self._num_given += 1
        given = _Given(share._replace(number=self._num_given), call)
        self._given[self._num_given] = given
        return given

    def _send_all_anew(self) -> None:
        super().end()
        for given in list(self._given.values()):
            self._send(given)

    def _send(self, given: _Given) -> bool:
        """Whether a process was started for it."""
        is_new = self.send(encode_share(given.share))
        if is_new:
            self._is_starting = True
            self.allow(_START_S)
        elif len(self._given) == 1:
            self.allow(self._deadline_s)
        return is_new

    @staticmethod
    def _answered(given: _Given, errors: dict[int, str]) -> None:
        given.call.errors.update(errors)
        given.call.num_shares -= 1
