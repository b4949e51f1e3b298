"""Scores of every caption with every video, from what the ranks have encoded.

Legend: C captions, U texts that differ, V videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.aggregate import Aggregation
from alpro_stream.evaluate.dual_softmax import dual_softmax
from alpro_stream.evaluate.features import Features, of_all_ranks, own_share, similarities
from alpro_stream.evaluate.matching import match_odds
from alpro_stream.evaluate.ranking import BothWays
from alpro_stream.evaluate.rerank import best_candidates, reranked
from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained

Score = Literal["vtc", "vtm"]


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


def check_can_score(trained: Trained, scores: Sequence[Score], remedy: str = "scores=[vtc]") -> None:
    """Refuses a model that has not what the scores need.

    Args:
        trained: the model.
        scores: that are wanted.
        remedy: settings that leave VTM out.

    Raises:
        ConfigError: it was trained for something else.
    """
    task, path = trained.description.task, trained.path
    if task == "question_answering":
        raise ConfigError(
            f"{path} was trained to answer questions: it has neither trained features nor a matching head. Set "
            "checkpoint to one of task pretrain or retrieval"
        )
    if "vtm" in scores and task == "prompter":
        raise ConfigError(f"{path} is a prompter: it has no matching head; set {remedy}")


def score_all(
    model: AlproModel | DualEncoder,
    features: Features,
    text_C: Tensor,
    num_videos: int,
    how: Scoring,
    world: World,
) -> dict[Score, BothWays[Tensor]]:
    """Scores by name, on the CPU; all ranks must ask, and all get them.

    Args:
        model: with a matching head, for VTM.
        features: of this rank: its videos, and its part of the U texts.
        text_C: which of the texts of all ranks a caption is.
        num_videos: V, of all ranks.
        how: which scores.
        world: the ranks; each fuses the texts that it has encoded with the videos of all.
    """
    dual = model.dual if isinstance(model, AlproModel) else model
    temperature = dual.temperature().item()
    num_texts = int(text_C.max()) + 1
    vtc_UV = similarities(features, num_texts, num_videos, world, how.num_clips, how.aggregation, temperature)
    text_C = text_C.to(vtc_UV.device)
    vtc_CV = vtc_UV[text_C]
    scores: dict[Score, BothWays[Tensor]] = {}
    if "vtc" in how.scores:
        scores["vtc"] = _in_both(dual_softmax(vtc_CV.double() / temperature) if how.dual_softmax else vtc_CV)
    if "vtm" in how.scores:
        scores["vtm"] = _matching(model, features, vtc_CV, text_C, how, world)
    return {name: BothWays(both.text_to_video.cpu(), both.video_to_text.cpu()) for name, both in scores.items()}


def _matching(
    model: AlproModel | DualEncoder, features: Features, vtc_CV: Tensor, text_C: Tensor, how: Scoring, world: World
) -> BothWays[Tensor]:
    """VTM of all pairs, or of those that VTC finds best."""
    if not isinstance(model, AlproModel):
        raise ConfigError("a prompter has no matching head; leave vtm out of scores")
    num_texts, num_videos = int(text_C.max()) + 1, vtc_CV.shape[1]
    wanted_UV = torch.ones(num_texts, num_videos, dtype=torch.bool, device=vtc_CV.device)
    if how.top_k is not None:
        best = BothWays(best_candidates(vtc_CV, how.top_k), best_candidates(vtc_CV.T, how.top_k).T)
        caption, video = (best.text_to_video | best.video_to_text).nonzero().unbind(dim=1)
        wanted_UV.fill_(False)[text_C[caption], video] = True
    own = torch.tensor(own_share(range(num_texts), world), device=vtc_CV.device)
    videos = replace(features.videos, tokens_VND=of_all_ranks(features.videos.tokens_VND, num_videos, world))
    with world.all_or_none("the pairs of all ranks"):
        own_odds_UV = match_odds(
            model, features.texts, videos, wanted_UV[own], how.batch_size, how.num_clips, how.aggregation
        )
    odds_UV = of_all_ranks(own_odds_UV, num_texts, world)
    # Before the texts become captions: what sigmoid gives can depend on the place in a matrix, by its last digit.
    match_CV = odds_UV.sigmoid()[text_C]
    if how.top_k is not None:
        return BothWays(reranked(vtc_CV, match_CV, best.text_to_video), reranked(vtc_CV, match_CV, best.video_to_text))
    return _in_both(dual_softmax(odds_UV[text_C]) if how.dual_softmax else match_CV)


def _in_both(scores_CV: Tensor) -> BothWays[Tensor]:
    """The same in both directions."""
    return BothWays(scores_CV, scores_CV)
