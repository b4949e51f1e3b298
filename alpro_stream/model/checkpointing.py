"""Activation checkpointing: a block keeps its input alone and is computed again in the backward pass.

Trades a second forward pass for memory; values and gradients stay the same, dropout included, as the random state
is kept with the input (Chen et al. 2016). The authors' own function for this lost the gradients of the weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: Callable[..., Any], checkpointing: bool, *arguments: Any) -> Any:
    """``block(*arguments)``, whose activations are not kept when `checkpointing` is on."""
    if not (checkpointing and torch.is_grad_enabled()):
        return block(*arguments)
    return checkpoint(block, *arguments, use_reentrant=False)


def set_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switches activation checkpointing of every encoder inside a model on or off."""
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = enabled  # type: ignore[assignment]
