"""Our stream as a process of its own, with the commands and answers of the peers: `benchmarks/peers/run.py`.

``python -m benchmarks.stream_ours SHARDS OPTIONS``, where OPTIONS is the stream's configuration in JSON. With
``null`` it is not the stream but its limit: libjpeg-turbo in as many threads, over the same frames in memory.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.corpus import decode_raw, open_loader, open_stream, stored_frames

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from process_tree import ProcessTree


def main(shards: Path, options: dict[str, Any] | None) -> None:
    """Answers each line `go SECONDS` of the standard input until it ends."""
    with open_stream(shards, **(options or {})) as (maker, plan):
        if options is None:
            jpegs = stored_frames(maker, plan)
            serve((decode_raw(jpegs) for _ in itertools.count()), 0)
            return
        with closing(open_loader(maker, plan)) as loader:
            serve((len(batch) for batch in loader), maker.config.decode.prefetch)


def serve(batches: Iterator[int], prefetch: int) -> None:
    """Takes batches for as long as each line says, and answers with what that gave.

    Args:
        batches: the number of clips of each.
        prefetch: how many may have been prepared while nobody asked; they must not count.
    """
    for _ in range(10):
        next(batches)
    processes = ProcessTree()
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(2 * prefetch + 1):
            next(batches)
        before, num_clips, started = processes.usage(), 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < float(line.split()[1]):
            num_clips += next(batches)
        after = processes.usage()
        answer = {
            "clips_per_s": num_clips / elapsed,
            "cpu_s_per_clip": (after.cpu_s - before.cpu_s) / num_clips,
            "bytes_read_per_clip": (after.read_bytes - before.read_bytes) / num_clips,
            "memory_mb": processes.peak_memory_bytes() / 1e6,
            "num_clips": num_clips,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
