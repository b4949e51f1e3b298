"""Gathers what a finished run left on the disk into its page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open

from alpro_launch.page_pictures import clip_examples, search_examples
from alpro_sharding.config import ShardConfig
from alpro_stream.config import Config, to_yaml
from alpro_stream.evaluate.retrieval import EvaluateConfig
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
_DESCRIPTIONS = {
    "vtc": "video-text contrastive",
    "vtm": "video-text matching",
    "mlm": "masked language modelling",
    "pem": "prompting entity modelling",
}


@dataclass(frozen=True)
class Stages:
    """The configurations of a whole run, in the order of its stages."""

    shard: ShardConfig
    prompter: RunConfig
    pretrain: RunConfig
    evaluate: EvaluateConfig

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
        created=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
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
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(render_report(report), encoding="utf-8")
    aside.rename(path)


def _key_numbers(stages: Stages, checkpoint: Path) -> KeyNumbers:
    sources = open_sources(stages.pretrain.stream.sources)
    num_samples = {"video": 0, "image": 0}
    for source in sources:
        num_samples[source.kind] += source.shape.num_samples
    lines = read_metrics(stages.prompter.run_dir) + read_metrics(stages.pretrain.run_dir)
    pretrain = read_metrics(stages.pretrain.run_dir)
    step_s = sum(line["step_s"] for line in pretrain)
    waits = {
        what: sum(line["step_s"] * line[f"{what}_wait_percent"] / 100 for line in pretrain) / step_s
        for what in ("data", "prompter")
    }
    return KeyNumbers(
        num_clips=num_samples["video"],
        num_images=num_samples["image"],
        num_frames=sum(_num_frames(source.reader, [s.name for s in source.shards]) for source in sources),
        num_shards=sum(len(source.shards) for source in sources),
        num_entities=len(read_description(checkpoint).entities),
        num_parameters=_num_parameters(checkpoint / WEIGHTS_FILE),
        num_steps=len(lines),
        clips_per_s=len(pretrain) * stages.pretrain.stream.global_batch / step_s,
        data_wait=waits["data"],
        prompter_wait=waits["prompter"],
    )


def _num_frames(reader: ShardReader, shards: Sequence[str]) -> int:
    return sum(reader.index(shard).num_frames(slot) for shard in shards for slot in range(len(reader.index(shard))))


def _num_parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


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


def _curves(config: RunConfig, stage: str) -> list[LossCurve]:
    lines = read_metrics(config.run_dir)
    # What guessing gives: one of the global batch for VTC, one match in three pairs for VTM.
    guessing = {"vtc": math.log(config.stream.global_batch), "vtm": math.log(3) - 2 / 3 * math.log(2)}
    return [
        LossCurve(
            name=name.upper(),
            stage=stage,
            steps=tuple(int(line["step"]) for line in lines if f"loss/{name}" in line),
            values=tuple(line[f"loss/{name}"] for line in lines if f"loss/{name}" in line),
            description=text,
            reference=guessing.get(name),
        )
        for name, text in _DESCRIPTIONS.items()
        if any(f"loss/{name}" in line for line in lines)
    ]


def _rejected(shards: Path) -> tuple[RejectedInput, ...]:
    path = shards / "failures.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return tuple(RejectedInput(line=r["line"], id=r["id"], stage=r["stage"], reason=r["reason"]) for r in rows)
