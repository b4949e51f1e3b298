"""Reading and writing weights: pretrained ViT and BERT to start from, and the project's own safetensors files."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import BertForMaskedLM

from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import Alpro, DualEncoder
from alpro_stream.model.text_encoder import MlmHead, MultimodalEncoder, TextEncoder
from alpro_stream.model.video_encoder import VideoEncoder

logger = logging.getLogger(__name__)

NAMES_SHOWN = 3
"""Parameter names that an error spells out before it counts the rest."""


@dataclass(frozen=True)
class StartReport:
    """What a pretrained model gave to ours."""

    source: str
    """The timm or hub name, or the file or folder."""
    loaded: tuple[str, ...]
    """Our parameters that were read."""
    missing: tuple[str, ...]
    """Our parameters that the source does not have; they keep their fresh values."""
    unused: tuple[str, ...]
    """Parameters of the source that we have no place for."""

    def __str__(self) -> str:
        return (
            f"{self.source}: {len(self.loaded)} parameters read, {len(self.missing)} start fresh "
            f"({_some(self.missing)}), {len(self.unused)} of the source unused ({_some(self.unused)})"
        )


def start_from_pretrained(model: Alpro | DualEncoder) -> list[StartReport]:
    """Reads the ViT and the BERT that the model's configuration names, and logs what was read.

    Raises:
        CheckpointError: a source is not there, or its sizes are not those of the model.
    """
    dual = model.dual if isinstance(model, Alpro) else model
    reports = []
    if source := dual.config.video.pretrained:
        reports.append(start_video_from_vit(dual.video_encoder, source))
    if source := dual.config.text.pretrained:
        upper = (model.multimodal, model.mlm_head) if isinstance(model, Alpro) else (None, None)
        reports.append(start_text_from_bert(dual.text_encoder, source, *upper))
    for report in reports:
        logger.info("%s", report)
    return reports


def start_video_from_vit(encoder: VideoEncoder, source: str) -> StartReport:
    """Makes the video encoder equal to an image ViT, run frame by frame.

    The temporal attention and norm copy the spatial ones, their output projection and the time embedding are
    zero. Position embeddings of another grid are resized in two dimensions (bicubic).

    Args:
        encoder: changed in place.
        source: a timm model name, or a local .safetensors or .pth file of such a model.

    Raises:
        CheckpointError: neither a file nor a timm model, a parameter is missing, or a size differs.
    """
    found = _read_vit(source)
    if "pos_embed" in found:
        grid = encoder.config.grid
        found["pos_embed"] = resample_abs_pos_embed(found["pos_embed"], [grid, grid], num_prefix_tokens=1)
    names = [name for name in encoder.state_dict() if "time_embed" not in name and "temporal_" not in name]
    report = _copy(encoder, found, {name: name for name in names}, source)
    encoder.start_time_as_identity()
    return report


def start_text_from_bert(
    text: TextEncoder,
    source: str,
    multimodal: MultimodalEncoder | None = None,
    mlm_head: MlmHead | None = None,
) -> StartReport:
    """Starts the text halves from a BERT: its first layers below, the following ones above.

    The head for masked tokens is read where the source has one; else it keeps its fresh values.

    Args:
        text: changed in place, as are the other two.
        source: a hub name or a local folder written by `save_pretrained`.
        multimodal: the upper half; None for a dual encoder.
        mlm_head: the head for masked tokens.

    Raises:
        CheckpointError: not a BERT, too few layers, or a size differs.
    """
    found = _read_bert(source)
    ours = nn.ModuleDict({"text": text})
    names = {f"text.{name}": f"bert.{name}" for name in text.state_dict()}
    if multimodal is not None:
        ours["multimodal"] = multimodal
        names |= {f"multimodal.{name}": f"bert.{name}" for name in multimodal.state_dict()}
    names = {own: _bert_layer(own, theirs, len(text.layers)) for own, theirs in names.items()}
    if mlm_head is not None:
        ours["mlm_head"] = mlm_head
        if "cls.predictions.bias" in found:
            names |= _mlm_names()
    return _copy(ours, found, names, source)


def save_weights(parameters: Mapping[str, Tensor], path: Path) -> None:
    """Writes the parameters of a model by name, such as its `state_dict`, as safetensors."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads a file of `save_weights`; the names and shapes must be exactly those of the model.

    Raises:
        CheckpointError: no such file, not safetensors, or a parameter that is missing, unknown or of another
            shape; the message names it.
    """
    if not path.is_file():
        raise CheckpointError(f"no such weights file: {path}")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    expected = model.state_dict()
    if unknown := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{path}: the model has no place for {_some(unknown)}; load it into the kind of model it was saved from"
        )
    _copy(model, found, {name: name for name in expected}, str(path))


@torch.no_grad()
def _copy(model: nn.Module, found: Mapping[str, Tensor], names: Mapping[str, str], source: str) -> StartReport:
    """Copies `found[names[own]]` to each own parameter; all is checked before anything is changed."""
    own = model.state_dict()
    if absent := [theirs for theirs in names.values() if theirs not in found]:
        raise CheckpointError(
            f"{source}: {_some(absent)} not in it; use weights of a model with the configured number of layers"
        )
    for name, theirs in names.items():
        if own[name].shape != found[theirs].shape:
            raise CheckpointError(
                f"{source}: {theirs} has shape {tuple(found[theirs].shape)} and the model expects "
                f"{tuple(own[name].shape)} for {name}; set the model's sizes (or its tokenizer) to those of "
                "the weights, or use other weights"
            )
    for name, theirs in names.items():
        own[name].copy_(found[theirs])
    return StartReport(
        source,
        loaded=tuple(names),
        missing=tuple(name for name in own if name not in names),
        unused=tuple(sorted(found.keys() - set(names.values()))),
    )


def _read_vit(source: str) -> dict[str, Tensor]:
    try:
        if Path(source).is_file():
            found: dict[str, Tensor] = timm.models.load_state_dict(source)
            return found
        if timm.is_model(source) or source.startswith(("hf-hub:", "hf_hub:")):
            return dict(timm.create_model(source, pretrained=True).state_dict())
    except Exception as error:  # timm, the hub client and the unpickler have no common base of their errors
        raise CheckpointError(f"{source}: cannot read this ViT: {error}") from error
    raise CheckpointError(
        f"{source}: neither a file nor a model that timm knows; give the path of a .safetensors or .pth file, "
        "or a name such as vit_base_patch16_224"
    )


def _read_bert(source: str) -> dict[str, Tensor]:
    try:
        model, info = BertForMaskedLM.from_pretrained(source, output_loading_info=True)
    except Exception as error:  # transformers and the hub client have no common base of their errors
        raise CheckpointError(
            f"{source}: cannot read this BERT: {error}; give a local folder with config.json and "
            "model.safetensors, or a hub name such as bert-base-uncased"
        ) from error
    fresh = set(info["missing_keys"])
    return {name: tensor for name, tensor in model.state_dict().items() if name not in fresh}


def _bert_layer(own: str, theirs: str, num_lower: int) -> str:
    """``bert.layers.0.x`` to ``bert.encoder.layer.N.x``, the upper half counted from `num_lower`."""
    if not theirs.startswith("bert.layers."):
        return theirs
    index, rest = theirs.removeprefix("bert.layers.").split(".", 1)
    first = num_lower if own.startswith("multimodal.") else 0
    return f"bert.encoder.layer.{first + int(index)}.{rest}"


def _mlm_names() -> dict[str, str]:
    parts = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
    names = {
        f"mlm_head.{own}.{leaf}": f"cls.predictions.{theirs}.{leaf}"
        for own, theirs in parts.items()
        for leaf in ("weight", "bias")
    }
    return names | {"mlm_head.bias": "cls.predictions.bias"}


def _some(names: list[str] | tuple[str, ...]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN]) or "none"
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
