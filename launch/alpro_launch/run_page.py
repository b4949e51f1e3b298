"""Gathers what the whole way, from shards to retrieval, left on the disk into its page: that of the demo."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpro_launch.page_parts import loss_curves, num_parameters, shown_time, totals, write_page
from alpro_launch.page_pictures import clip_examples, search_examples
from alpro_sharding.config import ShardConfig
from alpro_stream.config import Config, to_yaml
from alpro_stream.evaluate.retrieval import RetrievalConfig
from alpro_stream.model.folder import read_description
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.pages import (
    Command,
    KeyNumbers,
    LossCurve,
    RejectedInput,
    ReportData,
    RetrievalScore,
    RetrievalTable,
    StageTime,
    render_report,
)
from alpro_stream.pages import (
    RunConfig as ConfigText,
)
from alpro_stream.run import RunConfig
from alpro_stream.shards.reader import ShardReader
from alpro_stream.stream.sources import open_sources
from alpro_stream.train.checkpoint import latest_checkpoint, read_state
from alpro_stream.train.metrics import read_metrics

_NUM_CLIPS, _NUM_SEARCHES = 10, 6


@dataclass(frozen=True)
class Stages:
    """The configurations of a whole run, in the order of its stages."""

    shard: ShardConfig
    prompter: RunConfig
    pretrain: RunConfig
    evaluate: RetrievalConfig

    def named(self) -> dict[str, Config]:
        """By the name a reader knows them by."""
        return {
            "Sharding": self.shard,
            "Prompter": self.prompter,
            "Pre-training": self.pretrain,
            "Evaluation": self.evaluate,
        }


def write_run_page(
    path: Path,
    stages: Stages,
    *,
    title: str,
    summary: str,
    note: str,
    seconds: Mapping[str, float],
    commands: Sequence[tuple[str, str]],
) -> None:
    """Writes the page of a finished run.

    Args:
        path: the HTML file.
        stages: the run's configurations.
        title: heading.
        summary: one sentence below it.
        note: what the numbers do not say.
        seconds: wall-clock time by stage.
        commands: command lines with what they do.
    """
    result = json.loads((stages.evaluate.out / "result.json").read_text(encoding="utf-8"))
    checkpoint = latest_checkpoint(stages.pretrain.run_dir)
    score = "vtm" if "vtm" in result["metrics"] else "vtc"
    report = ReportData(
        title=title,
        summary=summary,
        created=shown_time(),
        note=note,
        numbers=_key_numbers(stages, checkpoint),
        stages=tuple(StageTime(name=name, seconds=value) for name, value in seconds.items()),
        retrieval=_retrieval(result),
        curves=(*_curves(stages.prompter, "Prompter"), *_curves(stages.pretrain, "ALPRO")),
        clips=clip_examples(stages.pretrain, _NUM_CLIPS),
        pem_threshold=stages.pretrain.losses.pem.threshold,
        searches=search_examples(stages.evaluate.out, stages.pretrain, score, _NUM_SEARCHES),
        rejected=_rejected(Path(stages.shard.out)),
        commands=tuple(Command(text=text, explanation=explanation) for text, explanation in commands),
        configs=tuple(ConfigText(name=name, yaml=to_yaml(config)) for name, config in stages.named().items()),
        versions=read_state(checkpoint)["versions"],
    )
    write_page(path, render_report(report))


def _key_numbers(stages: Stages, checkpoint: Path) -> KeyNumbers:
    sources = open_sources(stages.pretrain.stream.sources)
    num_samples = {"video": 0, "image": 0}
    for source in sources:
        num_samples[source.kind] += source.shape.num_samples
    prompter, pretrain = (totals(read_metrics(config.run_dir)) for config in (stages.prompter, stages.pretrain))
    return KeyNumbers(
        num_clips=num_samples["video"],
        num_images=num_samples["image"],
        num_frames=sum(_num_frames(source.reader, [s.name for s in source.shards]) for source in sources),
        num_shards=sum(len(source.shards) for source in sources),
        num_entities=len(read_description(checkpoint).entities),
        num_parameters=num_parameters(checkpoint / WEIGHTS_FILE),
        num_steps=prompter.num_steps + pretrain.num_steps,
        clips_per_s=pretrain.clips_per_s,
        data_wait=pretrain.data_wait,
        prompter_wait=pretrain.prompter_wait,
    )


def _num_frames(reader: ShardReader, shards: Sequence[str]) -> int:
    return sum(reader.index(shard).num_frames(slot) for shard in shards for slot in range(len(reader.index(shard))))


def _retrieval(result: Mapping[str, Any]) -> tuple[RetrievalTable, ...]:
    tables = []
    first = next(iter(result["metrics"].values()))
    for direction, title in (("text_to_video", "Text to video"), ("video_to_text", "Video to text")):
        counts = first[direction]
        num_right = 1 if direction == "text_to_video" else round(counts["num_candidates"] / counts["num_queries"])
        scores = tuple(
            RetrievalScore(
                name=name.upper(),
                recall_at_1=values[direction]["recall_at_1"] / 100,
                recall_at_5=values[direction]["recall_at_5"] / 100,
                recall_at_10=values[direction]["recall_at_10"] / 100,
                median_rank=values[direction]["median_rank"],
                mean_rank=values[direction]["mean_rank"],
            )
            for name, values in result["metrics"].items()
        )
        tables.append(
            RetrievalTable(
                title=title,
                num_queries=counts["num_queries"],
                num_candidates=counts["num_candidates"],
                num_right=num_right,
                scores=scores,
            )
        )
    return tuple(tables)


def _curves(config: RunConfig, stage: str) -> tuple[LossCurve, ...]:
    return loss_curves(read_metrics(config.run_dir), stage, config.stream.global_batch)


def _rejected(shards: Path) -> tuple[RejectedInput, ...]:
    path = shards / "failures.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return tuple(RejectedInput(line=r["line"], id=r["id"], stage=r["stage"], reason=r["reason"]) for r in rows)
