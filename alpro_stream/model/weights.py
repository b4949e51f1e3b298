"""Weights to start from: a ViT, a TimeSformer, a BERT."""

import logging
from pathlib import Path

import timm
from torch import Tensor, nn
from transformers import BertForMaskedLM

from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.model.loading import LoadReport, load_by_name
from alpro_stream.model.text_encoder import MlmHead, MultimodalEncoder, TextEncoder, TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoder
from alpro_stream.model.weight_files import read_tensors

logger = logging.getLogger(__name__)


def start_from_pretrained(model: AlproModel | DualEncoder) -> list[LoadReport]:
    """Reads the ViT (or TimeSformer) and the BERT that the model's configuration names, and logs what was read.

    Raises:
        CheckpointError: a source is not there, or its sizes are not those of the model.
    """
    dual = model.dual if isinstance(model, AlproModel) else model
    reports = []
    if source := dual.config.video.pretrained:
        reports.append(start_video_from_vit(dual.video_encoder, source))
    if source := dual.config.text.pretrained:
        upper = (model.multimodal, model.mlm_head) if isinstance(model, AlproModel) else (None, None)
        reports.append(start_text_from_bert(dual.text_encoder, source, *upper))
    for report in reports:
        logger.info("%s", report)
    return reports


def start_video_from_vit(encoder: VideoEncoder, source: str) -> LoadReport:
    """Starts the video encoder from an image ViT, or from a whole TimeSformer.

    After a ViT the encoder equals it, run frame by frame: the temporal attention and norm copy the spatial ones,
    their output projection and the time embedding are zero. Position and time embeddings are resized
    (`alpro_stream.model.loading`).

    Args:
        encoder: changed in place.
        source: a timm model name, or a local .safetensors or .pth file of such a model, or a .pyth file of
            facebookresearch/TimeSformer.

    Raises:
        CheckpointError: neither a file nor a timm model, a parameter is missing, or a size differs.
    """
    found = _read_vit(source, encoder.config.num_heads)
    own = encoder.state_dict()
    skipped = [name for name in found if _is_above(name, len(encoder.blocks))]
    used = {name: tensor for name, tensor in found.items() if name not in skipped}
    if "time_embed" in found:
        return load_by_name(encoder, used, source, skipped=skipped)
    temporal = [name for name in own if "time_embed" in name or "temporal_" in name]
    report = load_by_name(encoder, used, source, skipped=skipped, fresh=temporal)
    encoder.start_time_as_identity()
    return report


def start_text_from_bert(
    text: TextEncoder,
    source: str,
    multimodal: MultimodalEncoder | None = None,
    mlm_head: MlmHead | None = None,
) -> LoadReport:
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
    found = _read_bert(source, text.config)
    ours = nn.ModuleDict({"text_encoder": text})
    names = {f"text_encoder.{name}": f"bert.{name}" for name in text.state_dict()}
    if multimodal is not None:
        ours["multimodal"] = multimodal
        names |= {f"multimodal.{name}": f"bert.{name}" for name in multimodal.state_dict()}
    names = {own: _bert_layer(own, theirs, len(text.layers)) for own, theirs in names.items()}
    if mlm_head is not None:
        ours["mlm_head"] = mlm_head
        if "cls.predictions.bias" in found:
            names |= _mlm_names()
    if absent := [theirs for theirs in names.values() if theirs not in found]:
        raise CheckpointError(f"{source} has no {absent[0]}; use a BERT with at least the configured number of layers")
    taken = {own: found[theirs] for own, theirs in names.items()}
    skipped = found.keys() - set(names.values())
    return load_by_name(ours, taken, source, skipped=skipped, fresh=("mlm_head",))


def _read_vit(source: str, num_heads: int) -> dict[str, Tensor]:
    if Path(source).is_file():
        found = read_tensors(Path(source))
        # TimeSformer's own files hold the network inside a wrapper module.
        prefix = "model."
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if timm.is_model(source) or source.startswith(("hf-hub:", "hf_hub:")):
        try:
            model = timm.create_model(source, pretrained=True)
        except Exception as error:  # timm and the hub client have no common base of their errors
            raise CheckpointError(f"{source}: cannot read this ViT: {error}") from error
        theirs = getattr(model.blocks[0].attn, "num_heads", None) if hasattr(model, "blocks") else None
        if theirs != num_heads:  # Weights of other heads have the same shapes.
            raise CheckpointError(
                f"{source} is no ViT of {num_heads} heads (video.num_heads), it has {theirs or 'none'}"
            )
        return dict(model.state_dict())
    raise CheckpointError(
        f"{source}: neither a file nor a model that timm knows; give the path of a .safetensors or .pth file, "
        "or a name such as vit_base_patch16_224"
    )


def _is_above(name: str, depth: int) -> bool:
    """Whether a ViT's parameter belongs to its classifier, or to a block after our last one."""
    first, _, rest = name.partition(".")
    return first in ("head", "pre_logits") or (first == "blocks" and int(rest.partition(".")[0]) >= depth)


def _read_bert(source: str, config: TextEncoderConfig) -> dict[str, Tensor]:
    try:
        model, info = BertForMaskedLM.from_pretrained(source, output_loading_info=True, weights_only=True)
    except Exception as error:  # transformers and the hub client have no common base of their errors
        raise CheckpointError(
            f"{source}: cannot read this BERT: {error}; give a local folder with config.json and "
            "model.safetensors, or a hub name such as bert-base-uncased"
        ) from error
    ours = config.bert_config(model.config.vocab_size)
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # Weights do not tell these.
        if getattr(model.config, name) != getattr(ours, name):
            raise CheckpointError(
                f"{source}: its {name} is {getattr(model.config, name)} and that of the model {getattr(ours, name)}"
            )
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
