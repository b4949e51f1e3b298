"""The driver of ``benchmarks/shard.py``: a whole job over a large manifest whose shards are links to one real shard."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from alpro_sharding.config import ShardConfig
from alpro_sharding.duplicates import SampleHashes
from alpro_sharding.job import shard
from alpro_sharding.ray_job import OnPoll, OnResult
from alpro_sharding.results import HASHES_SUFFIX, ShardResult, Work
from alpro_sharding.statistics import Statistics
from alpro_sharding.worker import ShardTask
from alpro_stream.shards import ShardInfo
from alpro_stream.shards.layout import index_path, tar_path
from alpro_stream.testing.shards import write_dataset

_ROWS_OF_SHARD = 1000


def main(folder: Path, num_rows: int) -> None:
    """Prints how much the memory of this process grew for each row."""
    folder.mkdir(parents=True)
    manifest = folder / "manifest.jsonl"
    with manifest.open("w") as file:
        for number in range(num_rows):
            row = {"id": f"clip-{number:09d}", "media": f"videos/{number % 1000:03d}/{number}.mp4"}
            file.write(json.dumps({**row, "captions": [f"a man walks dog number {number} along the beach"]}) + "\n")
    links = _Links(folder / "real")
    config = ShardConfig.model_validate(
        {"manifest": str(manifest), "out": str(folder / "out"), "samples_per_shard": _ROWS_OF_SHARD}
    )
    small = folder / "small.jsonl"
    with manifest.open() as file:
        small.write_text("".join(file.readline() for _ in range(10 * _ROWS_OF_SHARD)))
    warm = config.model_copy(update={"manifest": str(small), "out": str(folder / "warm")})
    shard(warm, run=links.run)  # everything is imported and every buffer has its size
    before = _peak_bytes()
    summary = shard(config, run=links.run)
    assert summary.num_samples == num_rows, summary
    print(json.dumps({"bytes_per_row": (_peak_bytes() - before) / num_rows}))


class _Links:
    """Makes shards by linking to a real one; every sample has hashes of its own."""

    def __init__(self, folder: Path) -> None:
        self._directory = folder / "train"
        info = write_dataset(self._directory, video_shards=[_ROWS_OF_SHARD], num_frames=1, size=32)
        self._shard: ShardInfo = info.shards[0]

    def run(self, tasks: Iterable[ShardTask], num_workers: int | None, on_result: OnResult, on_poll: OnPoll) -> None:
        """Stands in for `run_tasks`."""
        del num_workers, on_poll
        for task in tasks:
            name = task.planned.name
            for path_of in (tar_path, index_path):
                os.link(path_of(self._directory, self._shard.name), path_of(task.directory, name))
            hashes = SampleHashes()
            for row in task.planned.rows:
                digest = hashlib.blake2b(row.id.encode(), digest_size=8).digest()
                hashes.add(int.from_bytes(digest, "little"), int.from_bytes(digest, "big"))
            task.note.with_suffix(HASHES_SUFFIX).write_bytes(hashes.to_bytes())
            shard_info = self._shard.model_copy(update={"name": name})
            work = Work("here", 1.0, 0.1, 0.8, 0.05, 0.05)
            result = ShardResult(len(task.planned.rows), shard_info, (), {"man": 1000, "dog": 1000}, Statistics(), work)
            task.note.write_bytes(result.to_json())
            on_result(task, result)


def _peak_bytes() -> int:
    # Of this process alone: getrusage counts from what its parent had when it was started.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
