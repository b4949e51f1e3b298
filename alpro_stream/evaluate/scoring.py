"""Scores of every caption with every video, from what the ranks have encoded. Legend: C captions, V videos."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.aggregate import Aggregation
from alpro_stream.evaluate.dual_softmax import dual_softmax
from alpro_stream.evaluate.features import Features, of_all_ranks, own_share, similarities
from alpro_stream.evaluate.matching import match_odds
from alpro_stream.evaluate.ranking import BothWays
from alpro_stream.evaluate.rerank import best_candidates, reranked
from alpro_stream.evaluate.result import Score
from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.train.distributed import World


@dataclass(frozen=True)
class Scoring:
    """How pairs are scored.

    Attributes:
        scores: which.
        top_k: candidates of a query that VTM looks at; None for all.
        dual_softmax: see `alpro_stream.evaluate.dual_softmax`; not with `top_k`.
        num_clips: of a video.
        aggregation: of their logits.
        batch_size: pairs of caption and clip that are fused at once.
    """

    scores: tuple[Score, ...] = ("vtc", "vtm")
    top_k: int | None = None
    dual_softmax: bool = False
    num_clips: int = 1
    aggregation: Aggregation = "mean"
    batch_size: int = 32


def score_all(
    model: AlproModel | DualEncoder, features: Features, num_captions: int, num_videos: int, how: Scoring, world: World
) -> dict[Score, BothWays[Tensor]]:
    """Scores by name, on the CPU; all ranks must ask, and all get them.

    Args:
        model: with a matching head, for VTM.
        features: of this rank.
        num_captions: C, of all ranks.
        num_videos: V, of all ranks.
        how: which scores.
        world: the ranks; each fuses the captions that it has encoded with the videos of all.
    """
    dual = model.dual if isinstance(model, AlproModel) else model
    temperature = dual.temperature().item()
    vtc_CV = similarities(features, num_captions, num_videos, world, how.num_clips, how.aggregation, temperature)
    scores: dict[Score, BothWays[Tensor]] = {}
    if "vtc" in how.scores:
        scores["vtc"] = _in_both(dual_softmax(vtc_CV.double() / temperature) if how.dual_softmax else vtc_CV)
    if "vtm" in how.scores:
        scores["vtm"] = _matching(model, features, vtc_CV, how, world)
    return {name: BothWays(both.text_to_video.cpu(), both.video_to_text.cpu()) for name, both in scores.items()}


def _matching(
    model: AlproModel | DualEncoder, features: Features, vtc_CV: Tensor, how: Scoring, world: World
) -> BothWays[Tensor]:
    """VTM of all pairs, or of those that VTC finds best."""
    if not isinstance(model, AlproModel):
        raise ConfigError("a prompter has no matching head; leave vtm out of scores")
    num_captions, num_videos = vtc_CV.shape
    wanted = _in_both(torch.ones_like(vtc_CV, dtype=torch.bool))
    if how.top_k is not None:
        wanted = BothWays(best_candidates(vtc_CV, how.top_k), best_candidates(vtc_CV.T, how.top_k).T)
    own = torch.tensor(own_share(range(num_captions), world), device=vtc_CV.device)
    wanted_CV = (wanted.text_to_video | wanted.video_to_text)[own]
    videos = replace(features.videos, tokens_VND=of_all_ranks(features.videos.tokens_VND, num_videos, world))
    with world.all_or_none("the pairs of all ranks"):
        own_odds_CV = match_odds(
            model, features.texts, videos, wanted_CV, how.batch_size, how.num_clips, how.aggregation
        )
    odds_CV = of_all_ranks(own_odds_CV, num_captions, world)
    if how.top_k is not None:
        match_CV = odds_CV.sigmoid()
        return BothWays(
            reranked(vtc_CV, match_CV, wanted.text_to_video), reranked(vtc_CV, match_CV, wanted.video_to_text)
        )
    return _in_both(dual_softmax(odds_CV) if how.dual_softmax else odds_CV.sigmoid())


def _in_both(scores_CV: Tensor) -> BothWays[Tensor]:
    """The same in both directions."""
    return BothWays(scores_CV, scores_CV)
