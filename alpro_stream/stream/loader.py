"""The loader: batches of one rank, prepared ahead of the step by a thread with a bounded queue behind it.

::

    loader thread: plan -> members of shards -> tokens, substitutes   -->   the step iterates
                                 |     ^                            batches
                                 v     |
    workers:                     pixels

One thread, with the next batch read and begun before it waits for the pixels of one: Python lets one thread at a time
run its code, and what decodes works without that lock, or in processes of its own. Pixels that a GPU makes are there
when a batch is handed over: what the step waits for them is all in the iteration.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from alpro_stream.stream.ahead import LookAhead
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.beside import Beside
from alpro_stream.stream.cursor import StepRange, num_steps_left, steps_left
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.maker import BatchMaker, StartedBatch
from alpro_stream.stream.plan import Plan, lanes_of_rank


class Loader:
    """Batches of one rank from a step on.

    The loader holds no position worth saving: what it has prepared and nobody used is simply made again.
    Iterating never waits for something that cannot come: after the last batch, an error or `close` it ends at once.
    ``len`` is the number of batches that are still to come, the same on every rank.

    Args:
        maker: makes one batch.
        plan: the order.
        rank: of this process.
        world_size: ranks of the run.
        first_step: the cursor.
        last_step: the step to stop before.
        skip_steps: ranges of steps to leave out.

    Raises:
        PlanError: the world size does not divide the lanes.
    """

    def __init__(
        self,
        maker: BatchMaker,
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        skip_steps: Sequence[StepRange] = (),
    ) -> None:
        self._maker = maker
        self._plan = plan
        self._lanes = lanes_of_rank(rank, world_size, plan.num_lanes)
        self._range = (first_step, last_step, tuple(skip_steps))
        self._num_left = num_steps_left(first_step, last_step, skip_steps)
        self._ahead = LookAhead(plan, self._lanes, maker.sources, self._steps())
        self._num_fetched = 0
        self._beside = Beside(maker.decoder.device)
        decode = maker.config.decode
        self._thread: threading.Thread | None = None
        self._waiting: Iterator[Batch] | None = None
        if decode.num_workers == 0:
            self._waiting = self._make_here()
            return
        self._ready = _Queue(decode.prefetch, decode.queue_mb << 20, maker.gauges)
        self._thread = threading.Thread(target=self._make_all, name="alpro-loader", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return self._num_left

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next()) is not None:
            self._num_left -= 1
            yield batch

    def figures(self) -> dict[str, float]:
        """What the stages did since the last call, see `Gauges.lap`."""
        gauges, num_fetched = self._maker.gauges, self._ahead.fetched_bytes()
        gauges.count("fetched_bytes", num_fetched - self._num_fetched)
        self._num_fetched = num_fetched
        return gauges.lap()

    def close(self) -> None:
        """Stops the thread, at the latest after the batch that it is at; what it had prepared is dropped.

        Ends the caches of remote sources too, so that nobody waits for a slow server.
        """
        self._waiting = None if self._waiting is None else iter(())
        self._ahead.stop()
        if self._thread is not None:
            self._ready.close()
            self._thread.join()

    def _next(self) -> Batch | None:
        batch = self._ready.take() if self._waiting is None else next(self._waiting, None)
        if batch is not None:
            self._beside.lend(batch.frames_BTHWC)
        return batch

    def _steps(self) -> Iterator[int]:
        return steps_left(*self._range)

    def _make_here(self) -> Iterator[Batch]:
        for step in self._steps():
            self._ahead.reached(step)
            with self._beside.entered():
                batch = self._maker.make(self._plan, step, self._lanes)
            yield self._whole(batch)

    def _make_all(self) -> None:
        error: BaseException | None = None
        try:
            with self._beside.entered():
                for batch in self._batches_ahead():
                    self._ready.put(batch)
                    if not self._ready.wait_for_room():
                        break
        except BaseException as raised:  # Handed to the thread that waits, whatever it is.
            error = raised
        self._ready.end(error)

    def _batches_ahead(self) -> Iterator[Batch]:
        """The batches, each with the next one read and begun before its pixels are waited for."""
        started: StartedBatch | None = None
        for step in self._steps():
            self._ahead.reached(step)
            try:
                read = self._maker.read(self._plan, step, self._lanes)
                if self._ready.is_closed:
                    return
                following = self._maker.start(read)
            except BaseException:
                if started is not None:  # the step gets what is in front of the error
                    yield self._whole(self._maker.finish(self._plan, started))
                raise
            if started is not None:
                yield self._whole(self._maker.finish(self._plan, started))
            started = following
        if started is not None:
            yield self._whole(self._maker.finish(self._plan, started))

    def _whole(self, batch: Batch) -> Batch:
        """The same batch, once a GPU has made its pixels."""
        with self._maker.gauges.busy("decode"):
            self._beside.wait()
        return batch


class _Queue:
    """Batches from one thread to another, bounded in number and in bytes; ends with an error, or without one."""

    def __init__(self, max_items: int, max_bytes: int, gauges: Gauges) -> None:
        self._max_items, self._max_bytes, self._gauges = max_items, max_bytes, gauges
        self._changed = threading.Condition()
        self._items: deque[Batch] = deque()
        self._num_bytes = 0
        # Of the largest so far: the next one is taken to be no larger.
        self._expected_bytes = 0
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nobody takes items any more."""
        return self._closed

    def wait_for_room(self) -> bool:
        """Waits until one more item may be made; False once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_room() or self._closed)
            return not self._closed

    def put(self, item: Batch) -> None:
        """Hands an item over; it is dropped when the queue is closed."""
        with self._changed:
            if not self._closed:
                self._items.append(item)
                self._num_bytes += item.num_bytes
                self._expected_bytes = max(self._expected_bytes, item.num_bytes)
                self._report()

    def take(self) -> Batch | None:
        """The next item; None when there will be none.

        Raises:
            BaseException: what ended the thread that fills the queue, once its items are taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended or self._closed)
            if self._items:
                item = self._items.popleft()
                self._num_bytes -= item.num_bytes
                self._report()
                return item
            if self._error and not self._closed:
                raise self._error
            return None

    def end(self, error: BaseException | None) -> None:
        """No more items come."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody takes items any more."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._num_bytes = 0
            self._report()

    def _has_room(self) -> bool:
        if not self._items:
            return True
        return len(self._items) < self._max_items and self._num_bytes + self._expected_bytes <= self._max_bytes

    def _report(self) -> None:
        self._gauges.queue("ready", self._num_bytes)
        self._changed.notify_all()
