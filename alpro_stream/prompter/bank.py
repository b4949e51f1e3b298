"""The prompt bank: one feature per entity and kind, built once for a prompter, a vocabulary and a tokenizer."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.prompter.labels import Kind
from alpro_stream.prompter.prompts import PROMPT_TOKENS, Prompting, prompts, templates
from alpro_stream.stream.text import Tokenizer

_KINDS: tuple[Kind, ...] = ("video", "image")
_PROMPTS_AT_ONCE = 256


@torch.inference_mode()
def build_bank(
    encoder: DualEncoder, tokenizer: Tokenizer, entities: Sequence[str], kind: Kind, prompting: Prompting = "ensemble"
) -> Tensor:
    """Prompt features (M, E): the mean of an entity's normalised template features (published code).

    The mean is not normalised again, so its product with a feature is not a cosine.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    texts = prompts(entities, kind, prompting)
    features = []
    for start in range(0, len(texts), _PROMPTS_AT_ONCE):
        ids, mask = tokenizer(texts[start : start + _PROMPTS_AT_ONCE], PROMPT_TOKENS)
        features.append(encoder.encode_text(ids.to(device), mask.to(device))[1])
    return torch.cat(features).reshape(len(templates(kind, prompting)), len(entities), -1).mean(dim=0)


def bank_path(
    directory: Path, digest: str, tokenizer: Tokenizer, entities: Sequence[str], prompting: Prompting = "ensemble"
) -> Path:
    """Where the bank of a combination is kept: another prompter, vocabulary or template is another file.

    Args:
        directory: where banks are kept.
        digest: of the prompter's weights.
        tokenizer: the prompter's own.
        entities: the vocabulary, in the order of the PEM head's outputs.
        prompting: which sentences.
    """
    parts = [digest, tokenizer.digest, *entities, *(t for kind in _KINDS for t in templates(kind, prompting))]
    name = hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]
    return directory / f"prompt_bank-{name}.safetensors"


def write_bank(
    encoder: DualEncoder, tokenizer: Tokenizer, entities: Sequence[str], path: Path, prompting: Prompting = "ensemble"
) -> None:
    """Builds the banks of both kinds and publishes them as one file."""
    banks: dict[str, Tensor] = {}
    for kind in _KINDS:
        banks[kind] = build_bank(encoder, tokenizer, entities, kind, prompting).cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    # A name of its own: where nodes share no file system to run in, each may be writing it.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(banks, aside)
    aside.rename(path)


def _remove_leftovers(directory: Path) -> None:
    """Of processes that were killed while they wrote."""
    for file in directory.glob(".prompt_bank-*"):
        writer = file.suffix.removeprefix(".")
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            file.unlink(missing_ok=True)


def load_bank(path: Path) -> dict[str, Tensor]:
    """The banks (M, E) by kind, mapped from the file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, and it is made again") from error
