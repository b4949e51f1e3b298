"""`alpro export`: any trained or released model as a folder for use, or as a file for the authors' code."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from alpro_stream.config import Config
from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.model.alpro import Task
from alpro_stream.model.folder import LoadedModel
from alpro_stream.model.foreign import load_foreign, open_foreign
from alpro_stream.model.reference_names import to_reference
from alpro_stream.pretrained import Alpro
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.restore import load_trained


class ExportOptions(Config):
    """What `alpro export` is told beside source and target."""

    format: Literal["folder", "authors"] = "folder"
    """A folder for `Alpro.from_pretrained`, or a .pt file under the names of the authors' code."""
    tokenizer: str | None = None
    """For a released file: a folder or a name on the hub."""
    num_tokens: int = 30
    """For a released file: length of its texts."""
    task: Task | None = None
    """For a released file: what to use it for."""
    prompter: bool = False
    """For a released pre-training file: the prompter inside it."""
    entities: Path | None = None
    """For a released pre-training file: the entities."""
    answers: Path | None = None
    """For a released question answering file: the answers."""
    sizes: tuple[str, ...] = ()
    """For a released file: changes such as ``video.num_frames=8``."""


def export(source: Path, out: Path, options: ExportOptions) -> list[str]:
    """Writes a model; returns what to tell the user.

    Raises:
        AlproError: the source is not to be read, or `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; name a new folder or file, or remove it")
    lines = []
    if source.is_file():
        loaded, line = _released(source, options)
        lines.append(line)
    elif given := _only_for_files(options):
        raise ConfigError(f"{', '.join(given)}: for a released file only; {source} is a folder and says it itself")
    else:
        loaded = load_trained(source, torch.device("cpu"))
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.format == "authors":
        text = loaded.description.model.text
        named = to_reference(loaded.model.state_dict(), loaded.description.task, text.num_layers)
        torch.save({name: tensor.contiguous() for name, tensor in named.items()}, out)
    else:
        Alpro(loaded).save_pretrained(out)
    return [*lines, f"written: {out}"]


def load_words(path: Path | None) -> list[str]:
    """A list of entities or answers from a file; none without a file.

    Args:
        path: text with one a line, a JSON list, a JSON object of word to number (the authors' answers), or
            entities.json of `alpro shard`.

    Raises:
        ConfigError: it cannot be read as any of these.
    """
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        values = json.loads(text)
        if isinstance(values, Mapping) and "entities" in values:
            return [str(row["word"]) for row in values["entities"]]
        if isinstance(values, Mapping):
            return [str(word) for word, _ in sorted(values.items(), key=lambda item: int(item[1]))]
        return [str(word) for word in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no list of words: {error}") from error


def _released(source: Path, options: ExportOptions) -> tuple[LoadedModel, str]:
    if options.tokenizer is None:
        raise CheckpointError(
            f"{source} is a file of weights and brings no tokenizer; give --tokenizer: for the released models "
            "bert-base-uncased, or a local folder of it"
        )
    loaded, report = load_foreign(
        open_foreign(source, prompter=options.prompter),
        Tokenizer(options.tokenizer, options.num_tokens),
        task=options.task,
        overrides=options.sizes,
        entities=_first_columns(load_words(options.entities), options.entities),
        answers=load_words(options.answers),
    )
    return loaded, str(report)


def _first_columns(words: list[str], path: Path | None) -> list[str]:
    """The authors' text file of entities has more columns than one; their code takes the first word of a line."""
    return words if path is None or path.suffix == ".json" else [line.split()[0] for line in words]


def _only_for_files(options: ExportOptions) -> Sequence[str]:
    """Options that were given and mean nothing for a folder."""
    return [name for name in sorted(options.model_fields_set) if name != "format" and getattr(options, name)]
