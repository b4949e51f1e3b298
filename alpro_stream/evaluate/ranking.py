"""Ranks and the metrics of retrieval. Legend: C captions, V videos; `truth_C` is the video of each caption."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from alpro_stream.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetrievalMetrics:
    """Recall at 1, 5 and 10 in percent, median and mean rank (1 is best), over so many queries and candidates."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    mean_rank: float
    num_queries: int
    num_candidates: int


def text_to_video_ranks(scores_CV: Tensor, truth_C: Tensor) -> Tensor:
    """Rank of each caption's video, int64; equal scores count against it."""
    _check_finite(scores_CV)
    own_C1 = scores_CV.gather(1, truth_C[:, None])
    return (scores_CV >= own_C1).sum(dim=1)


def video_to_text_ranks(scores_CV: Tensor, truth_C: Tensor) -> Tensor:
    """Rank of the best caption of each video that has one, int64; equal scores of other captions count against it."""
    _check_finite(scores_CV)
    own_CV = truth_C[:, None] == torch.arange(scores_CV.shape[1], device=scores_CV.device)
    best_V = scores_CV.masked_fill(~own_CV, -torch.inf).amax(dim=0)
    ranks_V = 1 + ((scores_CV >= best_V) & ~own_CV).sum(dim=0)
    return ranks_V[own_CV.any(dim=0)]


@dataclass(frozen=True)
class BothWays(Generic[T]):
    """One thing for each direction of retrieval: scores, which are (C, V) in both, or metrics."""

    text_to_video: T
    video_to_text: T


def metrics_both_ways(scores: "BothWays[Tensor]", truth_C: Tensor) -> "BothWays[RetrievalMetrics]":
    """Metrics of every caption as a query for its video, and of every video that has one as a query for a caption."""
    num_captions, num_videos = scores.text_to_video.shape
    return BothWays(
        retrieval_metrics(text_to_video_ranks(scores.text_to_video, truth_C), num_videos),
        retrieval_metrics(video_to_text_ranks(scores.video_to_text, truth_C), num_captions),
    )


def _check_finite(scores_CV: Tensor) -> None:
    if not scores_CV.isfinite().all():
        raise DataError("some scores are not finite: the weights of this checkpoint are of no use")


def retrieval_metrics(ranks: Tensor, num_candidates: int) -> RetrievalMetrics:
    """The usual figures of a list of ranks.

    Raises:
        DataError: no query at all.
    """
    if not len(ranks):
        raise DataError("nothing to evaluate: no query; the data set has no captions or no videos of this kind")
    ranks = ranks.double()
    recall = {k: 100 * (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return RetrievalMetrics(
        recall_at_1=recall[1],
        recall_at_5=recall[5],
        recall_at_10=recall[10],
        median_rank=ranks.quantile(0.5).item(),
        mean_rank=ranks.mean().item(),
        num_queries=len(ranks),
        num_candidates=num_candidates,
    )


def chance_text_to_video(num_videos: int) -> RetrievalMetrics:
    """What random scores reach on average when each caption has one video."""
    recall = {k: 100 * min(k, num_videos) / num_videos for k in (1, 5, 10)}
    return RetrievalMetrics(
        recall_at_1=recall[1],
        recall_at_5=recall[5],
        recall_at_10=recall[10],
        median_rank=(num_videos + 1) / 2,
        mean_rank=(num_videos + 1) / 2,
        num_queries=0,
        num_candidates=num_videos,
    )
