"""A model as a folder that can be used by itself: what `alpro export` writes, and part of every checkpoint.

::

    FOLDER/
        config.json        task, sizes, vocabulary size, entities, answers (`ModelDescription`, format 1)
        model.safetensors  the parameters by our names, float32
        tokenizer/         as `transformers` writes it
        README.md          the hub's model card, where it was exported
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from alpro_stream.config import Config, validate
from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.model.alpro import AlproModel, DualEncoder, ModelConfig, Task, build_model
from alpro_stream.model.loading import load_by_name
from alpro_stream.model.weight_files import WEIGHTS_FILE, read_tensors, save_weights
from alpro_stream.stream.text import Tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"


class ModelDescription(Config):
    """What config.json says of the weights beside it."""

    format_version: Literal[1] = 1
    """Of the folder."""
    task: Task
    """Decides which heads the model has."""
    model: ModelConfig
    """Sizes."""
    vocab_size: int = Field(gt=0)
    """Rows of the word embeddings."""
    num_tokens: int = Field(ge=3)
    """Length to which texts are cut or padded."""
    entities: tuple[str, ...] = ()
    """In the order of the PEM head's outputs."""
    answers: tuple[str, ...] = ()
    """In the order of the answer head's outputs."""

    @model_validator(mode="after")
    def _texts_fit(self) -> Self:
        if self.num_tokens > self.model.text.max_positions:
            raise ValueError(
                f"num_tokens {self.num_tokens} is more than the {self.model.text.max_positions} positions of the text "
                "encoder (model.text.max_positions)"
            )
        return self

    def with_frames(self, num_frames: int) -> Self:
        """The same for clips of another number of frames."""
        video = self.model.video.model_copy(update={"num_frames": num_frames})
        return self.model_copy(update={"model": self.model.model_copy(update={"video": video})})

    def build(self) -> AlproModel | DualEncoder:
        """A fresh model of this kind."""
        return build_model(self.task, self.model, self.vocab_size, len(self.entities), len(self.answers))


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to use it."""

    description: ModelDescription
    model: AlproModel | DualEncoder
    tokenizer: Tokenizer

    @property
    def dual(self) -> DualEncoder:
        """The two encoders with their projections, whatever was trained."""
        return self.model.dual if isinstance(self.model, AlproModel) else self.model


def write_model(
    directory: Path, description: ModelDescription, parameters: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes a model folder; `parameters` are those of the model, by our names."""
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(parameters, directory / WEIGHTS_FILE)
    tokenizer.save(directory / TOKENIZER_FOLDER)
    text = json.dumps(description.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_description(directory: Path) -> ModelDescription:
    """Reads config.json.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or not of this program.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return validate(ModelDescription, values, source=str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{error}; is this a model of alpro-stream?") from error


def read_model(directory: Path, num_frames: int | None = None) -> LoadedModel:
    """Loads a model folder, in evaluation mode, on the CPU.

    Args:
        directory: the folder.
        num_frames: of a clip, other than those it was trained on: the time embeddings are resized, as published.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not those of config.json.
        TokenizerError: the tokenizer is missing or not a BERT's.
    """
    description = read_description(directory)
    tokenizer = read_tokenizer(directory, description)
    if num_frames is not None:
        description = description.with_frames(num_frames)
    model = description.build()
    path = directory / WEIGHTS_FILE
    load_by_name(model, read_tensors(path), str(path))
    return LoadedModel(description, model.eval(), tokenizer)


def read_tokenizer(directory: Path, description: ModelDescription) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: it makes ids that the word embeddings do not have.
    """
    tokenizer = Tokenizer(str(directory / TOKENIZER_FOLDER), description.num_tokens)
    check_vocabulary(tokenizer, description.vocab_size, str(directory))
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, num_rows: int, source: str) -> None:
    """Refuses a tokenizer whose vocabulary and the word embeddings differ in size.

    Raises:
        CheckpointError: they do.
    """
    if tokenizer.vocab_size != num_rows:
        raise CheckpointError(
            f"{source}: the tokenizer knows {tokenizer.vocab_size} words and word_embeddings.weight has {num_rows} "
            "rows; use the tokenizer that the weights were trained with"
        )
