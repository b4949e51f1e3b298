"""A trained model from its checkpoint, for whoever is not the run that wrote it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alpro_stream.config import validate
from alpro_stream.errors import CheckpointError
from alpro_stream.losses.pem import PemConfig
from alpro_stream.model.alpro import Alpro, DualEncoder, ModelConfig
from alpro_stream.model.weights import load_weights
from alpro_stream.prompter.bank import bank_path, load_bank, write_bank
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.checkpoint import WEIGHTS_FILE, latest_checkpoint, read_state


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds for use.

    Attributes:
        path: the checkpoint.
        config: sizes of the model.
        model: `Alpro`, or `DualEncoder` when the run trained a prompter; in evaluation mode.
        tokenizer: as in training.
        entities: in the order of the PEM head's outputs; empty for a prompter.
        state: all of state.json.
    """

    path: Path
    config: ModelConfig
    model: Alpro | DualEncoder
    tokenizer: Tokenizer
    entities: tuple[str, ...]
    state: dict[str, Any]

    @property
    def dual(self) -> DualEncoder:
        """The two encoders with their projections, whatever was trained."""
        return self.model.dual if isinstance(self.model, Alpro) else self.model


def load_trained(path: Path, device: torch.device) -> Trained:
    """Loads the newest complete checkpoint of a run, or the checkpoint given.

    Raises:
        CheckpointError: none is there, or its parts do not fit each other.
    """
    checkpoint = latest_checkpoint(path)
    state = read_state(checkpoint)
    try:
        config = validate(ModelConfig, state["model"], source=str(checkpoint / "state.json"))
        task, num_tokens, vocab_size = state["task"], state["num_tokens"], state["vocab_size"]
        entities = tuple(state["entities"])
    except KeyError as error:
        raise CheckpointError(f"{checkpoint / 'state.json'} has no {error}; it was not written by a run") from error
    tokenizer = Tokenizer(str(checkpoint / "tokenizer"), num_tokens)
    dual = DualEncoder(config, vocab_size)
    model = dual if task == "prompter" else Alpro(config, vocab_size, len(entities))
    load_weights(model, checkpoint / WEIGHTS_FILE)
    return Trained(checkpoint, config, model.to(device).eval(), tokenizer, entities, state)


def start_from_run(model: Alpro | DualEncoder, tokenizer: Tokenizer, source: Path) -> None:
    """Gives a fresh model the two encoders of another run; the rest of it keeps its fresh weights.

    Raises:
        CheckpointError: no run is there, its tokenizer is another one, or its encoders have other sizes.
    """
    trained = load_trained(source, torch.device("cpu"))
    if trained.tokenizer.digest != tokenizer.digest:
        raise CheckpointError(f"{trained.path} was trained with another tokenizer; give both runs the same one")
    dual = model.dual if isinstance(model, Alpro) else model
    theirs = trained.dual.state_dict()
    for name, tensor in dual.state_dict().items():
        if (shape := theirs[name].shape if name in theirs else None) != tensor.shape:
            raise CheckpointError(
                f"{trained.path} cannot start this model: {name} has the shape {tuple(shape or ())} there and "
                f"{tuple(tensor.shape)} here; give both runs the same model"
            )
    dual.load_state_dict(theirs)


def ensure_bank(checkpoint: Path, entities: Sequence[str], directory: Path, device: torch.device) -> Path:
    """Path of the prompt bank of a prompter and a vocabulary; built on `device` when there is none yet."""
    checkpoint = latest_checkpoint(checkpoint)
    state = read_state(checkpoint)
    tokenizer = Tokenizer(str(checkpoint / "tokenizer"), state["num_tokens"])
    path = bank_path(directory, state["weights_sha256"], tokenizer, entities)
    if not path.is_file():
        write_bank(load_trained(checkpoint, device).dual, tokenizer, entities, path)
    return path


def load_labeller(checkpoint: Path, bank: Path, config: PemConfig, device: torch.device) -> Labeller:
    """The frozen prompter of a checkpoint with a stored bank; what the prompter process begins with."""
    trained = load_trained(checkpoint, device)
    return Labeller(trained.dual, load_bank(bank), config, trained.config.video.patch_size)
