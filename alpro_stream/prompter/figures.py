"""What the metrics say about soft labels. Legend: B samples, M entities.

Every figure is a quotient of sums over the global batch. A rank sums its own samples (`label_sums`, `top_counts`); the
sums of ranks and micro-batches are added, and only then divided (`with_figures`, `most_frequent`). Samples that are not
valid (`Batch.valid_B`) are nowhere counted.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alpro_stream.losses.objective import SoftLabels
from alpro_stream.losses.pem import IgnoreRule

_SUM = "pem_sum/"


def label_sums(labels: SoftLabels, valid_B: Tensor, rule: IgnoreRule) -> dict[str, Tensor]:
    """What `with_figures` divides: scalars in float32, to be added over micro-batches and ranks.

    Args:
        labels: of the prompter.
        valid_B: False for a sample that does not count.
        rule: which samples or entities are ignored; only `entity` ignores entities.
    """
    largest_B = labels.labels_BM.amax(dim=1)
    kept_B = labels.keep_B & valid_B
    entropy_B = torch.special.entr(labels.labels_BM).sum(dim=1)
    sums = {
        "samples": valid_B.float().sum(),
        "kept": kept_B.float().sum(),
        "entropy": entropy_B.where(kept_B, 0).sum(),
        "largest": largest_B.where(valid_B, 0).sum(),
    }
    if rule == "entity":
        sums["entities"] = sums["samples"] * labels.labels_BM.shape[1]
        sums["ignored"] = (labels.labels_BM == 0).sum(dim=1).where(valid_B, 0).sum().float()
    return {_SUM + name: value for name, value in sums.items()}


def with_figures(values: Mapping[str, float]) -> dict[str, float]:
    """Values of a step with the sums of `label_sums`, added up over the ranks, replaced by figures.

    ``pem/kept`` is the share of samples that PEM keeps, ``pem/entities_ignored`` (rule `entity` only) that of entities
    it ignores, ``pem/top_probability`` the mean of each sample's largest label (0 for one whose entities are all
    ignored), and ``pem/entropy`` the mean entropy of a label in nats over the samples that are kept. Without samples to
    take them over the shares are 0 and the means are left out. Values without such sums stay as they are.
    """
    sums = {name.removeprefix(_SUM): value for name, value in values.items() if name.startswith(_SUM)}
    figures = {name: value for name, value in values.items() if not name.startswith(_SUM)}
    if not sums:
        return figures
    figures["pem/kept"] = sums["kept"] / max(sums["samples"], 1)
    if "entities" in sums:
        figures["pem/entities_ignored"] = sums["ignored"] / max(sums["entities"], 1)
    if sums["samples"]:
        figures["pem/top_probability"] = sums["largest"] / sums["samples"]
    if sums["kept"]:
        figures["pem/entropy"] = sums["entropy"] / sums["kept"]
    return figures


def top_counts(labels: SoftLabels, valid_B: Tensor) -> Tensor:
    """How many of the kept samples have each entity as their largest label, (M,) in float32; to be added likewise."""
    kept_B = (labels.keep_B & valid_B).float()
    # Not bincount, which waits for a GPU.
    return kept_B.new_zeros(labels.labels_BM.shape[1]).index_add_(0, labels.labels_BM.argmax(dim=1), kept_B)


def most_frequent(counts_M: Sequence[float], entities: Sequence[str], number: int) -> list[tuple[str, float]]:
    """The entities that were the largest label most often, and of which share of the kept samples; most often first.

    Args:
        counts_M: sums of `top_counts`.
        entities: their names, in the same order.
        number: of entities; fewer where fewer ever were the largest.
    """
    total = sum(counts_M)
    ranked = sorted(zip(entities, counts_M, strict=True), key=lambda pair: -pair[1])
    return [(name, count / total) for name, count in ranked[:number] if count]
