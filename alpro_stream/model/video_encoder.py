"""Video encoder: TimeSformer with divided space-time attention (Bertasius et al. 2021, section 4.3).

Legend: B clips, T frames, C colours, H W pixels, P patches of a frame, D width, N = 1 + P, R rows, S tokens,
Q tokens that ask.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.model.checkpointing import run_block
from alpro_stream.model.precision import initialise_weights, truncated_normal

LAYER_NORM_EPS = 1e-6


class VideoEncoderConfig(Config):
    """Sizes of the video encoder; the defaults are ViT-B/16 on four frames."""

    image_size: int = Field(default=224, gt=0)
    """Height and width of a frame in pixels; a multiple of `patch_size`."""
    patch_size: int = Field(default=16, gt=0)
    """Side of a square patch in pixels."""
    num_frames: int = Field(default=4, gt=0)
    """Frames of a clip, each with a learned time embedding."""
    width: int = Field(default=768, gt=0)
    """Length of a token; a multiple of `num_heads`."""
    depth: int = Field(default=12, gt=0)
    """Number of space-time blocks."""
    num_heads: int = Field(default=12, gt=0)
    """Attention heads, in time and in space."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of a block's MLP over `width`."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block; rises linearly from 0 over the blocks."""
    still: Literal["repeat", "once"] = "repeat"
    """An image is a clip of one frame. `repeat` reads it as a clip of equal frames, as published; `once` encodes it as
    one frame with the mean of the time embeddings, which costs `num_frames` times less. The two are equal while the
    model ignores time, as a fresh one does, and differ afterwards: keep one of them for the life of a model."""
    pretrained: str | None = None
    """ViT to start from: a timm model name, or a local .safetensors or .pth file; null starts at random."""

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _check_sizes(self) -> "VideoEncoderConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; change one"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one")
        return self


class VideoEncoder(nn.Module):
    """Turns a clip into one CLS token and one token per patch position, averaged over the frames.

    The parameter names are those of a timm ViT, plus `time_embed` and the temporal parts of the blocks.
    """

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, embed_dim=width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, width))
        self.time_embed = nn.Parameter(torch.empty(1, config.num_frames, width))
        rates = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(SpaceTimeBlock(width, config.num_heads, config.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.checkpointing = False
        """Whether blocks are computed again in the backward pass; see `alpro_stream.model.checkpointing`."""
        self.apply(initialise_weights)
        truncated_normal(self.cls_token)
        truncated_normal(self.pos_embed)
        self.start_time_as_identity()

    @torch.no_grad()
    def start_time_as_identity(self) -> None:
        """Makes every block ignore time: the encoder then equals its ViT, run frame by frame."""
        nn.init.zeros_(self.time_embed)
        for block in self.blocks:
            assert isinstance(block, SpaceTimeBlock)
            block.start_time_as_identity()

    def forward(self, video_BTCHW: Tensor, only_cls: bool = False) -> Tensor:
        """Encodes normalised clips, or images as clips of one frame (`VideoEncoderConfig.still`).

        Args:
            video_BTCHW: pixels after `alpro_stream.model.pixels.normalise`; T is `num_frames`, or 1 for images.
            only_cls: see `forward_cls`.

        Returns:
            tokens_BND: CLS first, then the patches row by row; N is 1 with `only_cls`.

        Raises:
            ConfigError: the clip has another size or number of frames than configured.
        """
        if only_cls:
            *blocks, last = self.blocks
            assert isinstance(last, SpaceTimeBlock)
            patches_BTPD, cls_B1D = self._run(video_BTCHW, blocks)
            cls: Tensor = self.norm(last.forward_cls(patches_BTPD, cls_B1D))
            return cls
        patches_BTPD, cls_B1D = self._run(video_BTCHW, self.blocks)
        # Normalisation comes before the mean over frames, as in the published model; the two do not commute.
        return torch.cat([self.norm(cls_B1D), self.norm(patches_BTPD).mean(dim=1)], dim=1)

    def forward_cls(self, video_BTCHW: Tensor) -> Tensor:
        """The CLS token of `forward` alone, (B, D), for whoever compares features and fuses nothing.

        The last block then computes of the patches only what CLS reads.
        """
        # By a call, for which ZeRO 3 has the parameters there; so do the blocks.
        cls_B1D: Tensor = self(video_BTCHW, only_cls=True)
        return cls_B1D[:, 0]

    def embed(self, video_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens with their position and time, and the CLS token, which has a position only.

        The patches of an image are embedded once, and get the time of every frame by broadcasting.
        """
        batch, frames = video_BTCHW.shape[:2]
        patches_RPD: Tensor = self.patch_embed(video_BTCHW.flatten(0, 1))
        patches_BTPD = patches_RPD.view(batch, frames, *patches_RPD.shape[1:])
        encoded_once = frames == 1 and self.config.still == "once"
        time_1TD = self.time_embed.mean(dim=1, keepdim=True) if encoded_once else self.time_embed
        patches_BTPD = patches_BTPD + self.pos_embed[:, None, 1:] + time_1TD[:, :, None]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(video_BTCHW), -1, -1)
        return patches_BTPD, cls_B1D

    def _run(self, video_BTCHW: Tensor, blocks: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
        self._check_shape(video_BTCHW)
        patches_BTPD, cls_B1D = self.embed(video_BTCHW)
        for block in blocks:
            patches_BTPD, cls_B1D = run_block(block, self.checkpointing, patches_BTPD, cls_B1D)
        return patches_BTPD, cls_B1D

    def _check_shape(self, video_BTCHW: Tensor) -> None:
        size, frames = self.config.image_size, self.config.num_frames
        fits = video_BTCHW.ndim == 5 and video_BTCHW.shape[1] in (1, frames)
        if not fits or tuple(video_BTCHW.shape[2:]) != (3, size, size):
            raise ConfigError(
                f"the video encoder got clips of shape {tuple(video_BTCHW.shape)} and expects (batch, frames, colours, "
                f"height, width) = (any, {frames} or 1 for images, 3, {size}, {size}); make num_frames and image_size "
                "of the model and of the data agree"
            )


class SpaceTimeBlock(nn.Module):
    """Attention over the frames of each patch, then over the patches of each frame, then an MLP.

    CLS takes no part in time; in space every frame works on its own copy and the updates are averaged.
    Stochastic depth drops a branch for a whole clip, so that CLS and patches always agree.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.temporal_norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.temporal_attn = SelfAttention(width, num_heads)
        self.temporal_fc = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def start_time_as_identity(self) -> None:
        """Temporal attention copies the spatial one; its output projection is zero."""
        self.temporal_attn.load_state_dict(self.attn.state_dict())
        self.temporal_norm1.load_state_dict(self.norm1.state_dict())
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, patches_BTPD: Tensor, cls_B1D: Tensor, only_cls: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the patches and CLS after the three residual branches; with `only_cls` CLS is what counts."""
        patches_BTPD = patches_BTPD + self.drop_path(self._over_time(patches_BTPD))
        tokens_RND = self._frames_with_cls(patches_BTPD, cls_B1D)
        if only_cls:
            update_BT1D = self.drop_path(self.attn(tokens_RND, num_asking=1).view(*patches_BTPD.shape[:2], 1, -1))
            cls_B1D = cls_B1D + update_BT1D.mean(dim=1)
            return patches_BTPD, cls_B1D + self.drop_path(self.mlp(self.norm2(cls_B1D)))
        update_BTND = self.drop_path(self.attn(tokens_RND).view(*patches_BTPD.shape[:2], *tokens_RND.shape[1:]))
        patches_BTPD = patches_BTPD + update_BTND[:, :, 1:]
        cls_B1D = cls_B1D + update_BTND[:, :, :1].mean(dim=1)
        tokens_BSD = torch.cat([cls_B1D, patches_BTPD.flatten(1, 2)], dim=1)
        tokens_BSD = tokens_BSD + self.drop_path(self.mlp(self.norm2(tokens_BSD)))
        return tokens_BSD[:, 1:].view_as(patches_BTPD), tokens_BSD[:, :1]

    def forward_cls(self, patches_BTPD: Tensor, cls_B1D: Tensor) -> Tensor:
        """CLS of `forward` alone: in space only CLS asks, and only CLS goes through the MLP."""
        after: Tensor = self(patches_BTPD, cls_B1D, only_cls=True)[1]
        return after

    def _over_time(self, patches_BTPD: Tensor) -> Tensor:
        batch, frames, patches, width = patches_BTPD.shape
        frames_RTD = self.temporal_norm1(patches_BTPD).transpose(1, 2).flatten(0, 1)
        mixed_RTD = self.temporal_attn.mix(frames_RTD)
        # Nothing lies between the two projections: one product of the small matrices saves one over all tokens.
        inner, outer = self.temporal_attn.proj, self.temporal_fc
        bias = linear(inner.bias, outer.weight, outer.bias)
        update_RTD = linear(mixed_RTD, outer.weight @ inner.weight, bias)
        return update_RTD.view(batch, patches, frames, width).transpose(1, 2)

    def _frames_with_cls(self, patches_BTPD: Tensor, cls_B1D: Tensor) -> Tensor:
        """Rows of one frame each, normalised, with a copy of CLS at the front."""
        frames = patches_BTPD.shape[1]
        cls_BT1D = cls_B1D[:, None].expand(-1, frames, -1, -1)
        tokens_RND: Tensor = self.norm1(torch.cat([cls_BT1D, patches_BTPD], dim=2).flatten(0, 1))
        return tokens_RND


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_RSD: Tensor, num_asking: int | None = None) -> Tensor:
        """Every token of a row attends to all tokens of that row; projected_RQD.

        Args:
            tokens_RSD: rows of tokens.
            num_asking: Q, how many tokens at the front of a row are computed; None for all of them.
        """
        projected_RQD: Tensor = self.proj(self.mix(tokens_RSD, num_asking))
        return projected_RQD

    def mix(self, tokens_RSD: Tensor, num_asking: int | None = None) -> Tensor:
        """What the tokens read from each other, before the output projection; (R, Q, D)."""
        if num_asking is None:
            query, key, value = self._heads(self.qkv(tokens_RSD), 3)
        else:
            width = self.proj.in_features
            weight, bias = self.qkv.weight, self.qkv.bias
            (query,) = self._heads(linear(tokens_RSD[:, :num_asking], weight[:width], bias[:width]), 1)
            key, value = self._heads(linear(tokens_RSD, weight[width:], bias[width:]), 2)
        mixed = scaled_dot_product_attention(query, key, value)  # R, heads, Q, D / heads
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, joined: Tensor, count: int) -> tuple[Tensor, ...]:
        """Cuts (R, S, count x D) into `count` tensors of shape (R, heads, S, D / heads)."""
        rows, length, _ = joined.shape
        return joined.view(rows, length, count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
