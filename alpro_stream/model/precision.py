"""Number formats and initial values shared by the networks and the losses."""

import torch
from torch import Tensor, nn

INITIAL_STD = 0.02
"""Standard deviation of fresh weights in BERT and ViT alike."""


def at_least_float32(values: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def initialise_weights(module: nn.Module) -> None:
    """Fresh weights as BERT and ViT start: truncated normal matrices, zero biases, unit gains.

    Made for `nn.Module.apply`, so it touches the parameters of one module only.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        truncated_normal(module.weight)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        nn.init.zeros_(bias)


def truncated_normal(weight: Tensor) -> None:
    """Fills in place from a normal distribution cut at two standard deviations."""
    nn.init.trunc_normal_(weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
