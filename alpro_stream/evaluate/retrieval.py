"""Text-video retrieval from a checkpoint: features once per item, VTM once per pair, ranks both ways.

Legend: C captions, V videos.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.embed import StoredClip
from alpro_stream.evaluate.features import Features, encode_share, load_features, save_features
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, encoding
from alpro_stream.evaluate.queries import (
    CaptionUse,
    Queries,
    captions_per_video,
    different_texts,
    odd_captions,
    queries_of,
    split_digest,
)
from alpro_stream.evaluate.ranking import BothWays, RetrievalMetrics, chance_text_to_video, metrics_both_ways
from alpro_stream.evaluate.result import SCORES_FILE, Result, Split, digest_of
from alpro_stream.evaluate.runner import Outcome, run_task
from alpro_stream.evaluate.scoring import Score, Scoring, check_can_score, score_all
from alpro_stream.stream.decode import decoder_name
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained

logger = logging.getLogger(__name__)


class RetrievalConfig(EvaluationConfig):
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


class RetrievalSplit(Split):
    """What was asked for, and what there was to choose from."""

    num_captions: int


class RetrievalResult(Result):
    """What `result.json` of this task holds."""

    metrics: dict[Score, BothWays[RetrievalMetrics]] = Field(min_length=1)
    chance: RetrievalMetrics
    split: RetrievalSplit


def evaluate(config: RetrievalConfig, world: World | None = None) -> dict[str, Any]:
    """Scores, ranks and writes `result.json` and `scores.npz`; see `run_task`."""
    return run_task(_retrieve, config, world)


def _retrieve(config: RetrievalConfig, data: Opened, world: World) -> Outcome:
    clips, trained = data.clips, data.trained
    with world.all_or_none():
        queries = queries_of(clips, config.captions)
        _check(config, trained, len(clips), len(queries.captions))
        different = different_texts(queries.captions, trained.tokenizer, config.num_tokens)
    world.stage.enter("the encoders")
    with world.all_or_none("the features of all ranks"):
        features = _features(config, trained, clips, different.texts, world)
    world.stage.enter("the scores of all pairs")
    scoring = Scoring(
        config.scores,
        config.top_k if config.mode == "rerank" else None,
        config.dual_softmax,
        config.num_clips,
        config.aggregation,
        config.batch_size,
    )
    scores = score_all(trained.model, features, different.text_C, len(clips), scoring, world)
    metrics: dict[str, Any] = {name: asdict(metrics_both_ways(both, queries.truth_C)) for name, both in scores.items()}
    odd = odd_captions(queries.captions, trained.tokenizer, config.num_tokens or trained.description.num_tokens)
    odd_remark = f"of {len(queries.captions)} captions: {odd}; all of them are queries"
    write = partial(_write_scores, scores=scores, keys=[clip.key for clip in clips], queries=queries)
    return Outcome(
        metrics=metrics,
        chance=asdict(chance_text_to_video(len(clips))),
        protocol=_protocol(config),
        split={
            "digest": split_digest(clips, config.captions),
            "num_videos": len(clips),
            "num_captions": len(queries.captions),
            "captions_per_video": captions_per_video(queries, len(clips)),
            "captions_of_several_videos": different.num_of_several(queries.truth_C),
            "odd_captions": asdict(odd),
        },
        files={SCORES_FILE: write} if config.keep_scores else {},
        warnings=[odd_remark] if str(odd) else [],
    )


def _protocol(config: RetrievalConfig) -> dict[str, Any]:
    return {
        "captions": config.captions,
        "text_to_video": "every caption is a query for its video",
        "video_to_text": "every video with a caption is a query; the rank is that of its best caption",
        "equal_captions": "have equal scores; that of another video counts against the right answer",
        "ties": "count against the right answer",
        "mode": config.mode if "vtm" in config.scores else None,
        "top_k": config.top_k if config.mode == "rerank" else None,
        "dual_softmax": config.dual_softmax,
    }


def _check(config: RetrievalConfig, trained: Trained, num_videos: int, num_captions: int) -> None:
    """Refuses in the first seconds what would fail after hours."""
    check_can_score(trained, config.scores, "scores=[vtc] mode=exact" if config.mode == "rerank" else "scores=[vtc]")
    if config.mode == "rerank" and config.top_k > (fewer := min(num_videos, num_captions)):
        raise ConfigError(
            f"top_k={config.top_k} is more than there is to choose from: {num_videos} videos, {num_captions} captions. "
            f"Set top_k to {fewer} at most, or mode=exact"
        )


def _write_scores(
    file: BinaryIO, scores: Mapping[Score, BothWays[Tensor]], keys: Sequence[str], queries: Queries
) -> None:
    """Matrices of captions by videos under the name of the score, and what their rows are.

    Where re-ranking makes the two directions differ, that of videos to texts has a matrix of its own.
    """
    arrays: dict[str, Any] = {}
    for name, both in scores.items():
        arrays[name] = both.text_to_video.numpy()
        if not both.text_to_video.equal(both.video_to_text):
            arrays[f"{name}_video_to_text"] = both.video_to_text.numpy()
    captions, truth = np.array(queries.captions), queries.truth_C.numpy()
    np.savez(file, keys=np.array(keys), captions=captions, truth=truth, **arrays)


def _features(
    config: RetrievalConfig, trained: Trained, clips: Sequence[StoredClip], texts: Sequence[str], world: World
) -> Features:
    """Of this rank, from the cache where they are in it."""
    path = _cache_file(config, trained, clips, texts, world)
    if path and path.is_file():
        logger.info("features as of %s", path)
        return load_features(path, world.device)
    with encoding(config, trained, world) as how:
        features = encode_share(trained.dual, clips, texts, how, world)
    if path:
        save_features(features, path)
    return features


def _cache_file(
    config: RetrievalConfig, trained: Trained, clips: Sequence[StoredClip], texts: Sequence[str], world: World
) -> Path | None:
    """Named after all that decides what the encoders give, so that a file is never of something else."""
    if config.cache_dir is None:
        return None
    what = {
        "weights": trained.weights_sha256,
        "tokenizer": trained.tokenizer.digest,
        "items": [(clip.source.content, clip.shard, clip.slot) for clip in clips],
        "frames": [trained.dual.config.video.num_frames, config.num_clips, config.video.model_dump(mode="json")],
        "texts": [texts, config.num_tokens or trained.description.num_tokens],
        "decoder": decoder_name(config.decode),
    }
    return config.cache_dir / f"features-{digest_of(what)[:16]}-rank{world.rank}of{world.size}.safetensors"
