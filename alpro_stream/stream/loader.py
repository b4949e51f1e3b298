"""The loader: batches of one rank, prepared ahead on a thread of its own."""

import threading
from collections import deque
from collections.abc import Iterator

from alpro_stream.stream.batch import Batch
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.plan import Plan, lanes_of_rank


class Loader:
    """Batches of one rank from a step on, at most `decode.prefetch` of them prepared ahead on a thread.

    The loader holds no position worth saving: what it has prepared and nobody used is simply made again.
    Iterating never waits for something that cannot come: after the last batch, an error or `close` it ends at once.

    Args:
        maker: makes one batch.
        plan: the order.
        rank: of this process.
        world_size: ranks of the run.
        first_step: the cursor.
        last_step: the step to stop before.

    Raises:
        PlanError: the world size does not divide the lanes.
    """

    def __init__(
        self, maker: BatchMaker, plan: Plan, *, rank: int, world_size: int, first_step: int, last_step: int
    ) -> None:
        self._maker = maker
        self._plan = plan
        self._lanes = lanes_of_rank(rank, world_size, plan.num_lanes)
        self._steps = range(first_step, last_step)
        self._prefetch = maker.config.decode.prefetch
        # Guarded by the condition: what is prepared, and how it ended.
        self._changed = threading.Condition()
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._thread = threading.Thread(target=self._produce, name="alpro-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._take()) is not None:
            yield batch

    def close(self) -> None:
        """Stops the thread, at the latest after the batch it is making; what it had prepared is dropped."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _take(self) -> Batch | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error and not self._closed:
                raise self._error
            return None

    def _produce(self) -> None:
        try:
            for step in self._steps:
                if not self._wait_for_room():
                    break
                self._put(self._maker.make(self._plan, step, self._lanes))
        except BaseException as error:  # Handed to the thread that waits, whatever it is.
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Waits until a batch may be made; False once the loader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._prefetch or self._closed)
            return not self._closed

    def _put(self, batch: Batch) -> None:
        with self._changed:
            if not self._closed:
                self._ready.append(batch)
                self._changed.notify_all()
