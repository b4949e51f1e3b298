"""Which remote shards a rank needs next, told to their cache a little ahead of the reading."""

from collections.abc import Iterator, Sequence

import numpy as np

from alpro_stream.shards.cache import RemoteFile
from alpro_stream.shards.files import CachedFiles
from alpro_stream.stream.plan import Plan
from alpro_stream.stream.sources import Source

# Steps of the plan that are looked at beyond the one that is read, each time a step is reached: enough to be far ahead
# soon, and no more than some milliseconds of work.
_STEPS_AT_ONCE = 16
# Windows last for hundreds of steps: a shorter view would not reach the next one.
_MAX_STEPS = 5000
# Of small data sets those are many passes, and each shard is needed again and again. All that is told is written down
# at each change, and read by whoever makes room: it stays some hundred files.
_MAX_NEEDS = 1024


class LookAhead:
    """Follows the plan ahead of the reading and tells the caches of its sources what comes, in the order of need.

    Without remote sources it does nothing.

    Args:
        plan: the order.
        lanes: of this rank.
        sources: of the run.
        steps: the planned steps of the run, in order.
    """

    def __init__(self, plan: Plan, lanes: range, sources: Sequence[Source], steps: Iterator[int]) -> None:
        self._plan, self._lanes, self._sources, self._steps = plan, lanes, sources, steps
        self._caches = {
            id(files.cache): files.cache for source in sources if isinstance(files := source.reader.files, CachedFiles)
        }
        self._last_looked_at = -1
        # By source, pass, lane and shard: the steps that need it first and last, as far as was looked. A lane reads a
        # shard in one go; in all lanes and passes together, most shards would always be in use.
        self._needs: dict[tuple[int, int, int, int], tuple[int, int]] = {}

    def reached(self, step: int) -> None:
        """A step is about to be read."""
        if not self._caches:
            return
        before = set(self._needs)
        self._needs = {shard: steps for shard, steps in self._needs.items() if steps[1] >= step}
        for _ in range(_STEPS_AT_ONCE):
            sees_enough = len(self._needs) >= _MAX_NEEDS and self._last_looked_at > step
            if sees_enough or self._last_looked_at - step >= _MAX_STEPS or not self._look_at_next():
                break
        if before != set(self._needs):
            self._tell(step)

    def fetched_bytes(self) -> int:
        """Bytes that came over the network since the start."""
        return int(sum(cache.figures()["fetched_bytes"] for cache in self._caches.values()))

    def stop(self) -> None:
        """Ends the caches, so that whoever waits for a file hears of it at once; see `ShardCache.stop`."""
        for cache in self._caches.values():
            cache.stop()

    def _look_at_next(self) -> bool:
        step = next(self._steps, None)
        if step is None:
            return False
        planned = self._plan.part(step, self._lanes)
        for lane, refs in enumerate(planned.refs):
            for shard in np.unique(refs[:, 0]).tolist():
                need = (planned.source, planned.pass_index, lane, shard)
                first, _ = self._needs.get(need, (step, step))
                self._needs[need] = (first, step)
        self._last_looked_at = step
        return True

    def _tell(self, step: int) -> None:
        """What is in use comes first, then by the first need."""
        by_need = sorted(self._needs, key=lambda need: max(self._needs[need][0], step))
        order = dict.fromkeys((number, shard) for number, _, _, shard in by_need)
        files: dict[int, list[RemoteFile]] = {cache: [] for cache in self._caches}
        for number, shard in order:
            source = self._sources[number]
            if isinstance(source.reader.files, CachedFiles):
                remote, info = source.reader.files, source.shards[shard]
                files[id(remote.cache)] += [remote.index(info), remote.tar(info)]
        for cache, wanted in files.items():
            self._caches[cache].expect(wanted)
