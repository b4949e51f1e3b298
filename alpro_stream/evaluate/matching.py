"""VTM of pairs: one pass of the multimodal encoder for each.

Legend: C captions, V videos, K clips, P pairs, L text tokens, N video tokens, D width.
"""

import torch
from torch import Tensor

from alpro_stream.evaluate.aggregate import Aggregation, aggregate
from alpro_stream.evaluate.embed import TextEmbeddings, VideoEmbeddings
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.model.alpro import AlproModel


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
    clip_number_K = torch.arange(num_clips, device=device)
    for part in in_parts(range(len(pairs_P2)), batch_size // num_clips, "pairs of VTM"):
        span = slice(part[0], part[-1] + 1)
        some_P2 = pairs_P2[span]
        text, video = some_P2.repeat_interleave(num_clips, dim=0).unbind(dim=1)
        clip = video * num_clips + clip_number_K.repeat(len(some_P2))
        cls_B1D = model.multimodal(texts.text_CLD[text], texts.mask_CL[text], videos.tokens_VND[clip], num_tokens=1)
        # In float32 all sure matches would be exactly 1, and tie.
        logits_P2K = model.match_logits(cls_B1D[:, 0]).double().view(len(some_P2), num_clips, 2).transpose(1, 2)
        no, yes = aggregate(logits_P2K, aggregation).unbind(dim=1)
        odds_P[span] = yes - no
    odds_CV = torch.full(wanted_CV.shape, -torch.inf, dtype=torch.float64, device=device)
    odds_CV[tuple(pairs_P2.unbind(dim=1))] = odds_P
    return odds_CV
