"""A trained model, from whatever holds one: for whoever is not the run that wrote it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alpro_stream.errors import CheckpointError
from alpro_stream.losses.pem import PemConfig
from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.model.folder import (
    CONFIG_FILE,
    LoadedModel,
    ModelDescription,
    check_vocabulary,
    read_description,
    read_model,
    read_tokenizer,
)
from alpro_stream.model.foreign import open_foreign
from alpro_stream.model.loading import LoadReport, load_by_name
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.prompter.bank import bank_path, load_bank, write_bank
from alpro_stream.prompter.labels import Labeller, Precision
from alpro_stream.prompter.prompts import Prompting
from alpro_stream.shards.storage import file_digest
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.checkpoint import STATE_FILE, latest_checkpoint, read_state

logger = logging.getLogger(__name__)

_HEADS = ("vtm_head", "mlm_head", "pem_head", "answer_head")


@dataclass(frozen=True)
class Trained(LoadedModel):
    """A loaded model and the folder it came from."""

    path: Path

    @property
    def weights_sha256(self) -> str:
        """Digest of the file of weights."""
        return _weights_digest(self.path)


def model_folder(path: Path) -> Path:
    """The model folder that a path means: an exported one itself, or the newest complete checkpoint of a run.

    Raises:
        CheckpointError: neither is there.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give an exported model, a run or a checkpoint")
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; make a model folder of it first: alpro export {path} FOLDER --tokenizer NAME (with "
            "--prompter for the prompter inside a pre-training file)"
        )
    is_exported = (path / CONFIG_FILE).is_file() and not (path / STATE_FILE).is_file()
    return path if is_exported else latest_checkpoint(path)


def load_trained(path: Path, device: torch.device, num_frames: int | None = None) -> Trained:
    """Loads an exported model, the newest complete checkpoint of a run, or the checkpoint given; to evaluate it.

    Args:
        path: of any of these.
        device: where it computes.
        num_frames: see `read_model`.

    Raises:
        CheckpointError: none is there, or its parts do not fit each other.
    """
    folder = model_folder(path)
    loaded = read_model(folder, num_frames)
    return Trained(loaded.description, loaded.model.to(device), loaded.tokenizer, folder)


def start_from_trained(
    model: AlproModel | DualEncoder,
    tokenizer: Tokenizer,
    entities: Sequence[str],
    source: Path,
    answers: Sequence[str] = (),
) -> LoadReport:
    """Gives a fresh model all that another one has for it; its other heads keep their fresh weights.

    The heads of entities and answers are taken only where both were trained for the same ones. Position and time
    embeddings are resized.

    Args:
        model: changed in place.
        tokenizer: of the model.
        entities: of the model.
        source: a run, a checkpoint, an exported model, or a file of the authors' or of LAVIS's.
        answers: of the model.

    Raises:
        CheckpointError: none is there, its tokenizer is another one, or its encoders have other sizes.
    """
    if source.is_file():
        file = open_foreign(source)
        check_vocabulary(tokenizer, file.vocab_size, str(source))
        task = "prompter" if isinstance(model, DualEncoder) else file.task
        trained_for = file.task
        found, skipped = file.parameters(task, model.config)
        lists: dict[str, Sequence[str]] = {"pem_head": (), "answer_head": ()}
    else:
        trained = load_trained(source, torch.device("cpu"))
        if trained.tokenizer.digest != tokenizer.digest:
            raise CheckpointError(f"{trained.path} was trained with another tokenizer; give both runs the same one")
        found, skipped, trained_for = dict(trained.model.state_dict()), [], trained.description.task
        lists = {"pem_head": trained.description.entities, "answer_head": trained.description.answers}
    if trained_for == "question_answering" and not answers:
        logger.warning(
            "%s was trained to answer questions, which leaves the projections behind VTC's features as they were: the "
            "model that it was fine-tuned from is a better start for another task",
            source,
        )
    found = _under_names_of(model, found)
    own = model.state_dict()
    other = tuple(
        head for head, ours in (("pem_head", entities), ("answer_head", answers)) if tuple(ours) != tuple(lists[head])
    )
    own = {name: tensor for name, tensor in own.items() if not name.startswith(other)}
    # Heads may be left out, and by a dual encoder what lies above it; layers of an encoder may not.
    optional = _HEADS if isinstance(model, AlproModel) else (*_HEADS, "multimodal")
    unused = [name for name in found if name not in own and name.startswith(optional)]
    skipped += unused
    found = {name: tensor for name, tensor in found.items() if name not in unused}
    report = load_by_name(model, found, str(source), skipped=skipped, fresh=(*_HEADS, *_absent_encoder(found)))
    logger.info("%s", report)
    if any(name.startswith("multimodal.") for name in report.missing):
        logger.warning("%s has no multimodal encoder to start from: that of this run starts at random", source)
    return report


def ensure_bank(
    checkpoint: Path,
    entities: Sequence[str],
    directory: Path,
    device: torch.device,
    prompting: Prompting = "ensemble",
) -> Path:
    """Path of the prompt bank of a prompter and a vocabulary; built on `device` when there is none yet.

    Raises:
        CheckpointError: there is no prompter, or the bank that is there is damaged.
    """
    folder = model_folder(checkpoint)
    tokenizer = read_tokenizer(folder, read_description(folder))
    path = bank_path(directory, _weights_digest(folder), tokenizer, entities, prompting)
    if not path.is_file():
        write_bank(load_trained(folder, device).dual, tokenizer, entities, path, prompting)
    load_bank(path)  # Damage is this run's error, and not one of the prompter's process.
    return path


def load_labeller(
    checkpoint: Path,
    bank: Path,
    config: PemConfig,
    device: torch.device,
    precision: Precision = "fp32",
    compile: bool = False,
) -> Labeller:
    """The frozen prompter of a checkpoint with a stored bank; what the prompter process begins with."""
    trained = load_trained(checkpoint, device)
    return Labeller(trained.dual, load_bank(bank), config, trained.dual.config.video.patch_size, precision, compile)


def describe_prompter(checkpoint: Path) -> tuple[Path, ModelDescription, str]:
    """Folder, description and digest of a prompter, without reading its weights into a model."""
    folder = model_folder(checkpoint)
    return folder, read_description(folder), _weights_digest(folder)


def check_weights(folder: Path) -> None:
    """Compares the weights of a checkpoint with their digest, which `describe_prompter` takes as it is stored.

    Raises:
        CheckpointError: they differ.
    """
    path, recorded = folder / WEIGHTS_FILE, _weights_digest(folder)
    if (found := file_digest(path)) != recorded:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found}, and was {recorded} when it was saved; set prompter.checkpoint "
            f"to another checkpoint, or remove {folder} and let its run make it again"
        )


def _weights_digest(folder: Path) -> str:
    """Of the file of weights; a checkpoint has it stored, so that no rank reads a gigabyte for it at every start."""
    if (folder / STATE_FILE).is_file():
        return str(read_state(folder)["weights_sha256"])
    return file_digest(folder / WEIGHTS_FILE)


def _under_names_of(model: AlproModel | DualEncoder, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Between a dual encoder and a whole model the names of the encoders differ by ``dual.``."""
    has_prefix = any(name.startswith("dual.") for name in found)
    if isinstance(model, AlproModel):
        return found if has_prefix else {f"dual.{name}": tensor for name, tensor in found.items()}
    return {name.removeprefix("dual."): tensor for name, tensor in found.items()}


def _absent_encoder(found: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """A prompter has no multimodal encoder to give."""
    return () if any(name.startswith("multimodal.") for name in found) else ("multimodal",)
