"""Files of the authors' code and of LAVIS as models of ours: their sizes are read off the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from alpro_stream.config import validate, with_overrides
from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import ModelConfig, Task
from alpro_stream.model.folder import LoadedModel, ModelDescription, check_vocabulary
from alpro_stream.model.loading import LoadReport, load_by_name
from alpro_stream.model.reference_names import (
    from_reference,
    num_reference_text_layers,
    prompter_part,
    reference_task,
    without_bert,
)
from alpro_stream.model.weight_files import read_tensors
from alpro_stream.stream.text import Tokenizer

HEAD_SIZE = 64
"""Length of an attention head in every ViT and BERT that is published; weights do not tell it."""

_ONLY_FOR_FEATURES = ("dual.raw_temperature", "dual.video_projection", "dual.text_projection")


@dataclass(frozen=True)
class ForeignFile:
    """A file of the authors' names.

    Attributes:
        path: where it lies.
        task: what its model was trained for.
        tensors: by the authors' names.
    """

    path: Path
    task: Task
    tensors: Mapping[str, Tensor]

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings.

        Raises:
            CheckpointError: there are none.
        """
        sizes = [len(t) for name, t in self.tensors.items() if name.endswith("embeddings.word_embeddings.weight")]
        if not sizes:
            raise CheckpointError(f"{self.path} has no word_embeddings.weight; this file is not a whole model")
        return sizes[0]

    def config(self, overrides: Sequence[str] = ()) -> ModelConfig:
        """The sizes of the model, read off the weights, with ``key.path=value`` changes.

        Heads of attention are taken to be 64 long and the text layers to be cut in the middle, as published. Another
        number of frames or image size resizes the embeddings.

        Raises:
            ConfigError: an override that cannot be used.
        """
        return with_overrides(ModelConfig, _sizes(self.tensors, self.path), overrides, source=str(self.path))

    def parameters(self, task: Task, config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
        """The parameters of a task under our names, and the names that it does not use."""
        return from_reference(self.tensors, task, config.text.num_layers, str(self.path))


def open_foreign(path: Path, *, prompter: bool = False) -> ForeignFile:
    """Reads a file of the authors' or of LAVIS's.

    Args:
        path: a .pt, .pth or .safetensors file.
        prompter: take the frozen prompter that a pre-training file carries.

    Raises:
        CheckpointError: it cannot be read, or its names are not theirs.
    """
    tensors = read_tensors(path)
    task = reference_task(tensors)
    if task is None:
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors that begin with {next(iter(tensors))!r}: these are not the names of "
            "ALPRO's or LAVIS's models; a ViT, a TimeSformer or a BERT is named by model.video.pretrained or "
            "model.text.pretrained"
        )
    if prompter:
        return ForeignFile(path, "prompter", prompter_part(tensors, str(path)))
    return ForeignFile(path, task, tensors)


def load_foreign(
    file: ForeignFile,
    tokenizer: Tokenizer,
    *,
    task: Task | None = None,
    overrides: Sequence[str] = (),
    entities: Sequence[str] = (),
    answers: Sequence[str] = (),
) -> tuple[LoadedModel, LoadReport]:
    """Makes a model of ours from an opened file.

    Args:
        file: the opened file.
        tokenizer: the one it was trained with; bert-base-uncased for the released ones.
        task: what to use it for, where that is not what it was trained for.
        overrides: changes of the sizes, such as ``video.num_frames=8``.
        entities: the list behind the PEM head's outputs.
        answers: the list behind the answer head's outputs.

    Raises:
        CheckpointError: the file lacks what the task needs, or a list or the tokenizer has another length.
        ConfigError: an override that cannot be used, or a list that is needed and empty.
    """
    task = task or file.task
    config = file.config(overrides)
    check_vocabulary(tokenizer, file.vocab_size, str(file.path))
    parameters, skipped = file.parameters(task, config)
    entities = _fitting(entities, parameters, "pem_head.2.bias", "entities", file.path)
    answers = _fitting(answers, parameters, "answer_head.2.bias", "answers", file.path)
    values = {
        "task": task,
        "model": config,
        "vocab_size": file.vocab_size,
        "num_tokens": tokenizer.num_tokens,
        "entities": entities,
        "answers": answers,
    }
    description = validate(ModelDescription, values, source=str(file.path))
    model = description.build()
    # LAVIS's question answering models have none of what only features need; answers do not need it either.
    fresh = _ONLY_FOR_FEATURES if task == "question_answering" else ()
    report = load_by_name(model, parameters, str(file.path), skipped=skipped, fresh=fresh)
    for name in report.missing:  # Not random: two readings of a file must be the same model.
        model.state_dict()[name].zero_()
    return LoadedModel(description, model.eval(), tokenizer), report


def _fitting(
    words: Sequence[str], parameters: Mapping[str, Tensor], name: str, what: str, path: Path
) -> tuple[str, ...]:
    """One word for each output of a head; none without the head.

    As in the authors' code, a list of entities may be longer (its first words count), and one of answers shorter (their
    heads have at least 1500 outputs; those past the list have no text).
    """
    if name not in parameters:
        return ()
    num_outputs = parameters[name].numel()
    fits = len(words) >= num_outputs if what == "entities" else 0 < len(words) <= num_outputs
    if not fits:
        raise CheckpointError(
            f"{path}: {name} has {num_outputs} outputs and {len(words)} {what} were given; give the file with the list "
            f"of {what} it was trained with (--{what}), or a task that does not predict them (--task retrieval)"
        )
    return (*words[:num_outputs], *[""] * (num_outputs - len(words)))


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The plain tree of a `ModelConfig`."""
    video = "visual_encoder.model."
    plain = {without_bert(name): tensor for name, tensor in tensors.items()}

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in plain:
            raise CheckpointError(f"{path}: {name} is not among the weights; this file is not a whole model")
        found = tuple(plain[name].shape)
        if len(found) != ndim or 0 in found:
            raise CheckpointError(f"{path}: {name} has shape {found}, expected {ndim} dimensions")
        return found

    width, _, _, patch_size = shape(video + "patch_embed.proj.weight", 4)
    grid = round((shape(video + "pos_embed", 3)[1] - 1) ** 0.5)
    depth = len({name.split(".")[3] for name in tensors if name.startswith(video + "blocks.")})
    num_layers = num_reference_text_layers(tensors)
    # Every file of theirs has a matching head, used or not, and both halves; a prompter that we wrote has neither.
    num_lower = num_layers // 2 if {"itm_head.weight", "classifier.0.weight"} & plain.keys() else num_layers
    text_width = shape("text_encoder.embeddings.word_embeddings.weight", 2)[1]
    return {
        "video": {
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "num_frames": shape(video + "time_embed", 3)[1],
            "width": width,
            "depth": depth,
            "num_heads": max(1, width // HEAD_SIZE),
            "mlp_ratio": shape(video + "blocks.0.mlp.fc1.weight", 2)[0] / width,
        },
        "text": {
            "width": text_width,
            "num_layers": num_lower,
            "num_multimodal_layers": num_layers - num_lower or num_lower,
            "num_heads": max(1, text_width // HEAD_SIZE),
            "intermediate_size": shape("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
            "max_positions": shape("text_encoder.embeddings.position_embeddings.weight", 2)[0],
        },
    } | ({"projection_size": shape("vision_proj.weight", 2)[0]} if "vision_proj.weight" in plain else {})
