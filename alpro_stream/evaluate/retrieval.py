"""Text-video retrieval from a checkpoint: features once per item, VTM once per pair, ranks both ways.

Legend: C captions, V videos.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.embed import StoredClip
from alpro_stream.evaluate.features import Features, encode_share, load_features, save_features
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, alone, encoding, of_frames, opened, result_of
from alpro_stream.evaluate.queries import (
    CaptionUse,
    OddCaptions,
    Queries,
    captions_per_video,
    odd_captions,
    queries_of,
    split_digest,
)
from alpro_stream.evaluate.ranking import chance_text_to_video, metrics_both_ways
from alpro_stream.evaluate.result import Score, write_result, write_scores
from alpro_stream.evaluate.scoring import Scoring, score_all
from alpro_stream.stream.decode import decoder_name
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained

logger = logging.getLogger(__name__)


class EvaluateConfig(EvaluationConfig):
    """Retrieval over the videos and captions of some data sets; docs/evaluation.md."""

    task: Literal["retrieval"] = "retrieval"
    """What is evaluated; see the other modules of `alpro_stream.evaluate`."""
    captions: CaptionUse = "all"
    """What is a query: every caption of a video, the first, or all joined in their order (paragraph retrieval)."""
    scores: tuple[Score, ...] = ("vtc", "vtm")
    """By what candidates are ranked: feature similarity, or the matching head as published."""
    mode: Literal["exact", "rerank"] = "exact"
    """VTM of all pairs as published, or of the `top_k` that VTC finds for each query, in each direction."""
    top_k: int = Field(default=16, ge=1)
    """Candidates of a query that `rerank` looks at; the others stay behind them in the order of VTC."""
    dual_softmax: bool = False
    """Scores are weighed over all queries of the test set at once; not comparable with what ranks one at a time."""
    keep_scores: bool = True
    """Write scores.npz: 8 bytes for each pair of caption and video."""
    cache_dir: Path | None = None
    """Folder for the outputs of the encoders, for the next evaluation of the same model on the same data by as many
    ranks; 4 bytes for each number of each token. Null keeps none."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mode == "rerank" and "vtm" not in self.scores:
            raise ValueError("mode=rerank orders the best of VTC by VTM: add vtm to scores, or use mode=exact")
        if self.mode == "rerank" and self.dual_softmax:
            raise ValueError("dual_softmax needs the score of every pair, and mode=rerank has few: use mode=exact")
        return self


def evaluate(config: EvaluateConfig, world: World | None = None) -> dict[str, Any]:
    """Scores, ranks and writes `result.json` and `scores.npz`; returns what result.json holds. Called on every rank.

    Args:
        config: what to evaluate.
        world: the ranks; None for this process alone.

    Raises:
        AlproError: see `alpro_stream.errors`.
    """
    world = world or alone()
    with opened(config, world) as data:
        clips, trained = data.clips, data.trained
        with world.all_or_none():
            queries = queries_of(clips, config.captions)
            _check(config, trained, len(clips), len(queries.captions))
        world.stage.enter("the encoders")
        with world.all_or_none("the features of all ranks"):
            features = _features(config, trained, clips, queries, world)
    world.stage.enter("the scores of all pairs")
    scoring = Scoring(
        config.scores,
        config.top_k if config.mode == "rerank" else None,
        config.dual_softmax,
        config.num_clips,
        config.aggregation,
        config.batch_size,
    )
    scores = score_all(trained.model, features, len(queries.captions), len(clips), scoring, world)
    metrics = {name: metrics_both_ways(both, queries.truth_C) for name, both in scores.items()}
    odd = odd_captions(queries.captions, trained.tokenizer, config.num_tokens or trained.description.num_tokens)
    result = result_of(
        config,
        trained,
        metrics={name: asdict(both) for name, both in metrics.items()},
        protocol=_protocol(config, trained),
        split=_split(config, data, queries, odd),
        chance=asdict(chance_text_to_video(len(clips))),
    )
    with world.all_or_none("the files of rank 0"):
        if world.is_first:
            if str(odd):
                logger.warning("of %d captions: %s; all of them are queries", len(queries.captions), odd)
            if config.keep_scores:
                write_scores(config.out, scores, [clip.key for clip in clips], queries)
            write_result(config.out, result)
    return result


def _split(config: EvaluateConfig, data: Opened, queries: Queries, odd: OddCaptions) -> dict[str, Any]:
    """What was asked for, and what there was to choose from."""
    clips = data.clips
    return {
        "digest": split_digest(clips, config.captions),
        "num_videos": len(clips),
        "num_captions": len(queries.captions),
        "captions_per_video": captions_per_video(queries, len(clips)),
        "odd_captions": asdict(odd),
        "sources": {source.name: source.content for source in data.sources},
    }


def _protocol(config: EvaluateConfig, trained: Trained) -> dict[str, Any]:
    """All that decides what the figures mean, and is neither the model nor the data."""
    return {
        "captions": config.captions,
        "text_to_video": "every caption is a query for its video",
        "video_to_text": "every video with a caption is a query; the rank is that of its best caption",
        "ties": "count against the right answer",
        **of_frames(config, trained),
        "mode": config.mode if "vtm" in config.scores else None,
        "top_k": config.top_k if config.mode == "rerank" else None,
        "dual_softmax": config.dual_softmax,
    }


def _check(config: EvaluateConfig, trained: Trained, num_videos: int, num_captions: int) -> None:
    """Refuses in the first seconds what would fail after hours."""
    task, path = trained.description.task, trained.path
    if task == "question_answering":
        raise ConfigError(
            f"{path} was trained to answer questions: it has neither trained features nor a matching head. Set "
            "checkpoint to one of task pretrain or retrieval"
        )
    if "vtm" in config.scores and task == "prompter":
        raise ConfigError(f"{path} is a prompter: it has no matching head; set scores=[vtc]")
    if config.mode == "rerank" and config.top_k > (fewer := min(num_videos, num_captions)):
        raise ConfigError(
            f"top_k={config.top_k} is more than there is to choose from: {num_videos} videos, {num_captions} captions. "
            f"Set top_k to {fewer} at most, or mode=exact"
        )


def _features(
    config: EvaluateConfig, trained: Trained, clips: Sequence[StoredClip], queries: Queries, world: World
) -> Features:
    """Of this rank, from the cache where they are in it."""
    path = _cache_file(config, trained, clips, world)
    if path and path.is_file():
        logger.info("features as of %s", path)
        return load_features(path, world.device)
    with encoding(config, trained, world) as how:
        features = encode_share(trained.dual, clips, queries.captions, how, world)
    if path:
        save_features(features, path)
    return features


def _cache_file(config: EvaluateConfig, trained: Trained, clips: Sequence[StoredClip], world: World) -> Path | None:
    """Named after all that decides what the encoders give, so that a file is never of something else."""
    if config.cache_dir is None:
        return None
    what = {
        "weights": trained.weights_sha256,
        "tokenizer": trained.tokenizer.digest,
        "items": [(clip.source.content, clip.shard, clip.slot) for clip in clips],
        "frames": [trained.dual.config.video.num_frames, config.num_clips, config.video.model_dump(mode="json")],
        "texts": [config.captions, config.num_tokens or trained.description.num_tokens],
        "decoder": decoder_name(config.decode),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return config.cache_dir / f"features-{digest[:16]}-rank{world.rank}of{world.size}.safetensors"
