"""Weights by name into a model: everything is checked and reported, nothing stays random unless it was declared."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from alpro_stream.errors import CheckpointError

NAMES_SHOWN = 3
"""Parameter names that an error spells out before it counts the rest."""


@dataclass(frozen=True)
class LoadReport:
    """What a source gave to a model.

    Attributes:
        source: the file, folder or name.
        loaded: our parameters that were read as they are.
        resized: our parameters that were interpolated, with both shapes.
        skipped: parameters of the source that we have no use for.
        missing: our parameters that the source does not have; they keep their fresh values.
    """

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} parameters loaded, {len(self.resized)} resized ({some(self.resized)})"
        skipped = f"{len(self.skipped)} of the source skipped ({groups(self.skipped)})"
        return f"{self.source}: {counts}, {skipped}, {len(self.missing)} start fresh ({groups(self.missing)})"


@torch.no_grad()
def load_by_name(
    model: nn.Module,
    found: Mapping[str, Tensor],
    source: str,
    *,
    skipped: Iterable[str] = (),
    fresh: Collection[str] = (),
) -> LoadReport:
    """Copies tensors under our own names into a model; all is checked before anything is changed.

    Position embeddings of another grid are resized in two dimensions (bicubic), time embeddings of another number of
    frames by nearest neighbour, as published. Everything else must have the shape of the model.

    Args:
        model: changed in place.
        found: tensors by our names.
        source: for messages.
        skipped: names of the source that were left out on purpose, for the report.
        fresh: first parts of names (such as ``vtm_head``) that the source may lack.

    Raises:
        CheckpointError: a parameter is missing, unknown, of another shape or not finite; the message names it.
    """
    own = model.state_dict()
    if unknown := sorted(found.keys() - own.keys()):
        raise CheckpointError(
            f"{source}: the model has no place for {some(unknown)}; load it into the kind of model it was saved from"
        )
    missing = [name for name in own if name not in found]
    if undeclared := [name for name in missing if not name.startswith(tuple(fresh))]:
        raise CheckpointError(
            f"{source}: {some(undeclared)} not in it; use weights of the same kind of model, with the configured "
            "number of layers"
        )
    fitted, resized = {}, []
    for name, tensor in found.items():
        fitted[name] = _fit(name, tensor, own[name].shape, source)
        if tensor.shape != own[name].shape:
            resized.append(f"{name} {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
    if counts := [name for name, tensor in fitted.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"{source}: {some(counts)} has whole numbers, expected weights")
    if wrong := [name for name, tensor in fitted.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{source}: {some(wrong)} has values that are not finite; these weights are of no use")
    for name, tensor in fitted.items():
        own[name].copy_(tensor)
    whole = tuple(name for name in found if found[name].shape == own[name].shape)
    return LoadReport(source, whole, tuple(resized), tuple(sorted(skipped)), tuple(missing))


def some(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(list(names)[:NAMES_SHOWN]) or "none"
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def groups(names: Collection[str]) -> str:
    """Names by their first part, such as ``prompter.* (462)``: a report of a thousand parameters stays readable."""
    counts: dict[str, int] = {}
    for name in names:
        head, separator, _ = name.partition(".")
        counts[head + (".*" if separator else "")] = counts.get(head + (".*" if separator else ""), 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items()) or "none"


def _fit(name: str, tensor: Tensor, shape: torch.Size, source: str) -> Tensor:
    if tensor.shape == shape:
        return tensor
    same_width = tensor.ndim == 3 and len(shape) == 3 and tensor.shape[::2] == shape[::2]
    if same_width and name.endswith("pos_embed"):
        grid = round((shape[1] - 1) ** 0.5)
        if round((tensor.shape[1] - 1) ** 0.5) ** 2 == tensor.shape[1] - 1:
            resized: Tensor = resample_abs_pos_embed(tensor.float(), [grid, grid], num_prefix_tokens=1)
            return resized
    if same_width and name.endswith("time_embed"):
        return nearest_frames(tensor, shape[1])
    raise CheckpointError(
        f"{source}: {name} has shape {tuple(tensor.shape)} and the model expects {tuple(shape)}; set the model's "
        "sizes (or its tokenizer) to those of the weights, or use other weights"
    )


def nearest_frames(time_1TD: Tensor, num_frames: int) -> Tensor:
    """Time embeddings for another number of frames: frame i of n takes entry ``floor(i * T / n)``, as published."""
    index = torch.arange(num_frames) * time_1TD.shape[1] // num_frames
    return time_1TD[:, index]
