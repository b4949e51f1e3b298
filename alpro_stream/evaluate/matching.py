"""VTM of pairs: one pass of the multimodal encoder for each.

Legend: C captions, V videos, K clips, P pairs, L text tokens, N video tokens, D width.
"""

import logging
import time

import torch
from torch import Tensor

from alpro_stream.evaluate.aggregate import Aggregation, aggregate
from alpro_stream.evaluate.embed import TextEmbeddings, VideoEmbeddings
from alpro_stream.model.alpro import AlproModel

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0


def matching_scores(model: AlproModel, texts: TextEmbeddings, videos: VideoEmbeddings, batch_size: int) -> Tensor:
    """Probability that caption and video match, of every pair, (C, V) float64: the published final score."""
    wanted_CV = torch.ones(len(texts.text_CLD), len(videos.tokens_VND), dtype=torch.bool)
    return match_odds(model, texts, videos, wanted_CV, batch_size).sigmoid()


@torch.inference_mode()
def match_odds(
    model: AlproModel,
    texts: TextEmbeddings,
    videos: VideoEmbeddings,
    wanted_CV: Tensor,
    batch_size: int,
    num_clips: int = 1,
    aggregation: Aggregation = "mean",
) -> Tensor:
    """Log-odds that caption and video match, (C, V) float64; their sigmoid is the probability.

    Args:
        model: with a matching head.
        texts: of the captions.
        videos: `num_clips` rows for each video.
        wanted_CV: the pairs that are looked at; minus infinity elsewhere.
        batch_size: pairs of caption and clip that go through the encoder at once.
        num_clips: of a video.
        aggregation: of their logits, before the softmax as in ClipBERT.
    """
    device = texts.text_CLD.device
    pairs_P2 = wanted_CV.to(device).nonzero()
    odds_P = torch.empty(len(pairs_P2), dtype=torch.float64, device=device)
    started = told = time.monotonic()
    clip_number_K, size = torch.arange(num_clips, device=device), max(1, batch_size // num_clips)
    for start in range(0, len(pairs_P2), size):
        some_P2 = pairs_P2[start : start + size]
        text, video = some_P2.repeat_interleave(num_clips, dim=0).unbind(dim=1)
        clip = video * num_clips + clip_number_K.repeat(len(some_P2))
        cls_B1D = model.multimodal(texts.text_CLD[text], texts.mask_CL[text], videos.tokens_VND[clip], num_tokens=1)
        # In float32 all sure matches would be exactly 1, and tie.
        logits_P2K = model.match_logits(cls_B1D[:, 0]).double().view(len(some_P2), num_clips, 2).transpose(1, 2)
        no, yes = aggregate(logits_P2K, aggregation).unbind(dim=1)
        odds_P[start : start + size] = yes - no
        if (now := time.monotonic()) > told + _TELL_EVERY_S:
            done, told = start + len(some_P2), now
            left_s = (now - started) / done * (len(pairs_P2) - done)
            logger.info("VTM: %d of %d pairs of this rank, %.0f s left", done, len(pairs_P2), left_s)
    odds_CV = torch.full(wanted_CV.shape, -torch.inf, dtype=torch.float64, device=device)
    odds_CV[tuple(pairs_P2.unbind(dim=1))] = odds_P
    return odds_CV
