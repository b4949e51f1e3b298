"""The method written down literally, for the comparison in `benchmarks/step.py`: nobody trains with this.

Each pass by itself, as the paper's text has it and as a first implementation would write it: attention as two products
with a softmax between them, clean and masked text encoded one after the other, the multimodal encoder run for the
positives, the negatives and the masked text in turn and for all tokens, negatives drawn row by row. It reads the
parameters of our own model, so that both compute the same numbers.

Legend as in `alpro_stream.losses.objective`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, normalize

from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.model.pixels import crop_outside_black, normalise
from alpro_stream.stream.batch import Batch


def losses(model: AlproModel, batch: Batch, labels_BM: Tensor, keep_B: Tensor) -> dict[str, Tensor]:
    """The four losses of a batch of one lane."""
    size, length = batch.ids_BL.shape
    video_BND = video_encoder(model.dual, normalise(batch.frames_BTHWC))
    text_BLD = text_encoder(model.dual, batch.ids_BL, batch.mask_BL)
    video_BE = normalize(model.dual.video_projection(video_BND[:, 0]).float(), dim=1)
    text_BE = normalize(model.dual.text_projection(text_BLD[:, 0]).float(), dim=1)
    similarity_BB = video_BE @ text_BE.T / model.dual.temperature()
    targets_B = torch.arange(size, device=similarity_BB.device)
    vtc = (cross_entropy(similarity_BB, targets_B) + cross_entropy(similarity_BB.T, targets_B)) / 2
    videos, texts = negatives(similarity_BB)

    positive_BSD = multimodal(model, text_BLD, batch.mask_BL, video_BND)
    negative_RSD = multimodal(
        model,
        torch.cat([text_BLD, text_BLD[texts]]),
        torch.cat([batch.mask_BL, batch.mask_BL[texts]]),
        torch.cat([video_BND[videos], video_BND]),
    )
    logits_R2 = model.match_logits(torch.cat([positive_BSD, negative_RSD])[:, 0])
    vtm = cross_entropy(logits_R2.float(), (torch.arange(3 * size, device=logits_R2.device) < size).long())

    masked_BLD = text_encoder(model.dual, batch.mlm_ids_BL, batch.mask_BL)
    masked_BSD = multimodal(model, masked_BLD, batch.mask_BL, video_BND)
    logits_BLV = model.word_logits(masked_BSD[:, :length])
    mlm = cross_entropy(logits_BLV.float().flatten(0, 1), batch.mlm_labels_BL.flatten())

    regions = []
    for patches_PD, (top, left, height, width) in zip(
        positive_BSD[:, length + 1 :], batch.boxes_B4.tolist(), strict=True
    ):
        grid = patches_PD.unflatten(0, (model.config.video.grid, -1))
        regions.append(grid[top : top + height, left : left + width].flatten(0, 1).mean(dim=0))
    log_p_BM = model.entity_logits(torch.stack(regions)).float().log_softmax(dim=1)
    pem = -(labels_BM * log_p_BM).sum(dim=1)[keep_B].sum() / keep_B.sum().clamp(min=1)
    return {"vtc": vtc, "vtm": vtm, "mlm": mlm, "pem": pem}


@torch.no_grad()
def soft_labels(prompter: DualEncoder, bank_ME: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The prompter's distribution over entities, and which samples are kept."""
    crops = crop_outside_black(batch.frames_BTHWC, batch.boxes_B4, prompter.config.video.patch_size)
    cls_BD = video_encoder(prompter, normalise(crops))[:, 0]
    feature_BE = normalize(prompter.video_projection(cls_BD).float(), dim=1)
    labels_BM = (feature_BE @ bank_ME.T / prompter.temperature()).softmax(dim=1)
    return labels_BM, labels_BM.amax(dim=1) >= 0.2


def negatives(similarity_BB: Tensor) -> tuple[list[int], list[int]]:
    """One draw a row from the softmax without the diagonal: a video for each text, a text for each video."""
    drawn = []
    for scores_BB in (similarity_BB.T, similarity_BB):
        weights_BB = scores_BB.detach().softmax(dim=1).fill_diagonal_(0)
        drawn.append([int(torch.multinomial(row, 1).item()) for row in weights_BB])
    return drawn[0], drawn[1]


def video_encoder(dual: DualEncoder, video_BTCHW: Tensor) -> Tensor:
    """tokens_BND of divided space-time attention, block by block."""
    encoder: Any = dual.video_encoder
    patches_BTPD, cls_B1D = encoder.embed(video_BTCHW)
    batch, frames, patches, width = patches_BTPD.shape
    for block in encoder.blocks:
        rows = patches_BTPD.transpose(1, 2).reshape(batch * patches, frames, width)
        update = block.temporal_fc(attention(block.temporal_attn, block.temporal_norm1(rows)))
        update = update.view(batch, patches, frames, width).transpose(1, 2)
        patches_BTPD = patches_BTPD + block.drop_path(update)
        cls_BT1D = cls_B1D[:, None].expand(-1, frames, -1, -1)
        rows = torch.cat([cls_BT1D, patches_BTPD], dim=2).reshape(batch * frames, 1 + patches, width)
        update = block.drop_path(attention(block.attn, block.norm1(rows)).view(batch, frames, 1 + patches, width))
        patches_BTPD, cls_B1D = patches_BTPD + update[:, :, 1:], cls_B1D + update[:, :, :1].mean(dim=1)
        tokens = torch.cat([cls_B1D, patches_BTPD.flatten(1, 2)], dim=1)
        tokens = tokens + block.drop_path(block.mlp(block.norm2(tokens)))
        cls_B1D, patches_BTPD = tokens[:, :1], tokens[:, 1:].view(batch, frames, patches, width)
    return torch.cat([encoder.norm(cls_B1D), encoder.norm(patches_BTPD).mean(dim=1)], dim=1)


def attention(part: Any, tokens_RSD: Tensor) -> Tensor:
    """Multi-head self-attention of the video encoder."""
    rows, length, width = tokens_RSD.shape
    qkv = part.qkv(tokens_RSD).reshape(rows, length, 3, part.num_heads, width // part.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    projected: Tensor = part.proj((weights @ value).transpose(1, 2).reshape(rows, length, width))
    return projected


def text_encoder(dual: DualEncoder, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """text_BLD of the lower layers."""
    encoder: Any = dual.text_encoder
    return bert_layers(encoder.layers, encoder.embeddings(ids_BL), mask_BL)


def multimodal(model: AlproModel, text_BLD: Tensor, mask_BL: Tensor, video_BND: Tensor) -> Tensor:
    """fused_BSD of the upper layers."""
    mask_BS = torch.cat([mask_BL, mask_BL.new_ones(video_BND.shape[:2])], dim=1)
    return bert_layers(model.multimodal.layers, torch.cat([text_BLD, video_BND], dim=1), mask_BS)


def bert_layers(layers: Any, tokens_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Layers of a BERT, attention written out."""
    scores_B11S = (1 - mask_BS.float())[:, None, None] * -10000.0
    batch, length, width = tokens_BSD.shape
    for layer in layers:
        part = layer.attention.self
        shape = (batch, length, part.num_attention_heads, -1)
        query, key, value = (
            linear(tokens_BSD).view(shape).transpose(1, 2) for linear in (part.query, part.key, part.value)
        )
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + scores_B11S).softmax(dim=-1)
        weights = dropout(weights, part.dropout.p, layer.training)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
        attended = layer.attention.output(mixed, tokens_BSD)
        tokens_BSD = layer.output(layer.intermediate(attended), attended)
    return tokens_BSD
