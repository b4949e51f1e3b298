"""MLM, masked language modelling loss (Devlin et al. 2019, section 3.1).

Legend: B texts, L tokens, V vocabulary.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from alpro_stream.model.precision import at_least_float32

IGNORED_LABEL = -100


def mlm_loss(logits_BLV: Tensor, labels_BL: Tensor, num_masked: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the masked tokens.

    Args:
        logits_BLV: scores of the vocabulary.
        labels_BL: the original id of a masked token, -100 elsewhere.
        num_masked: the denominator, when it counts more tokens than these; None counts the labels.

    Returns:
        The loss; 0 with zero gradients when no token is masked.
    """
    total = cross_entropy(
        at_least_float32(logits_BLV).flatten(0, 1),
        labels_BL.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    count = (labels_BL != IGNORED_LABEL).sum() if num_masked is None else num_masked
    return total / count.clamp(min=1)
