"""The worker of ``benchmarks/shard.py``: makes the same shard again and again, in a process like one of Ray's."""

import json
import sys
from pathlib import Path

from alpro_sharding.assign import PlannedShard
from alpro_sharding.config import ShardConfig
from alpro_sharding.entities import EntityConfig, noun_options
from alpro_sharding.job import media_options
from alpro_sharding.worker import ShardTask, make_shard
from alpro_stream.manifest import ManifestRow, kind_of


def serve(job: dict[str, object]) -> None:
    """Makes the shard for each line that is read; answers with the share of writing and the number of samples."""
    clips, out = [str(clip) for clip in job["clips"]], Path(str(job["out"]))  # type: ignore[attr-defined]
    frames = {"sampling": job["sampling"], "max_frames": 1000}
    config = ShardConfig.model_validate({"manifest": "-", "out": str(out), "frames": frames})
    captions = ("a man walks a dog along the beach",)
    rows = [
        ManifestRow(str(line), clip, captions, (), None, None, "train", kind_of(clip), line)
        for line, clip in enumerate(clips, 1)
    ]
    tasks = [
        ShardTask(
            planned=PlannedShard("train", kind, 0, tuple(row for row in rows if row.kind == kind)),
            media_root="/",
            directory=out,
            note=out / f"{kind}.json",
            options=media_options(config),
            nouns=noun_options(EntityConfig()),
        )
        for kind in sorted({row.kind for row in rows})
    ]
    for _ in sys.stdin:
        for tar in out.glob("*.tar"):
            tar.unlink()  # else its samples would be taken over
        results = [make_shard(task) for task in tasks]
        work = [result.work for result in results]
        answer = {
            "write_share": sum(each.write_s for each in work) / sum(each.wall_s for each in work),
            "num_samples": sum(result.shard.num_samples for result in results if result.shard),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
