"""`alpro export`: any trained or released model as a folder for use, or as a file for the authors' code."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from alpro_stream.config import Config, changes
from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.model.alpro import Task
from alpro_stream.model.folder import LoadedModel
from alpro_stream.model.foreign import ForeignFile, load_foreign, open_foreign
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
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        aside = Path(folder) / out.name  # Whole or not at all.
        if options.format == "authors":
            lines.append(_write_for_authors(loaded, aside))
        else:
            Alpro(loaded).save_pretrained(aside)
        aside.rename(out)
    return [*lines, f"written: {out}"]


def load_words(path: Path | None) -> list[str]:
    """A list of entities or answers from a file; none without a file.

    Args:
        path: text with one a line (counts after a word are left out), a JSON list, a JSON object of word to number
            (the authors' answers), or entities.json of `alpro shard`.

    Raises:
        ConfigError: it cannot be read as any of these.
    """
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        words = _of_json(json.loads(text)) if path.suffix == ".json" else _first_columns(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no list of words: {error}") from error
    if wrong := [word for word in words if not isinstance(word, str) or not word.strip()]:
        raise ConfigError(f"{path} is no list of words: {wrong[0]!r} is in it")
    if doubled := [word for word, count in Counter(words).items() if count > 1]:
        raise ConfigError(f"{path} has {doubled[0]!r} more than once: each is an output of the model")
    return words


def _of_json(values: Any) -> list[Any]:
    if isinstance(values, Mapping) and "entities" in values:
        return [row["word"] for row in values["entities"]]
    if isinstance(values, Mapping):
        if sorted(values.values()) != list(range(len(values))):
            raise ValueError(f"its numbers are not 0 to {len(values) - 1}, each once")
        return sorted(values, key=values.__getitem__)
    if not isinstance(values, list):
        raise TypeError(f"a {type(values).__name__}")
    return values


def _first_columns(text: str) -> list[str]:
    """A word a line; counts after it, as in the authors' file of entities, are left out."""
    lines = [re.split(r"\t|\s+(?=[\d.]+\s*$)", line.strip())[0] for line in text.splitlines()]
    return [line.strip() for line in lines if line.strip()]


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
        entities=load_words(options.entities),
        answers=load_words(options.answers),
    )
    video, text = loaded.description.model.video, loaded.description.model.text
    assumed = (
        f"assumed, as weights do not tell: video.num_heads={video.num_heads} text.num_heads={text.num_heads} "
        f"text.num_layers={text.num_layers} (of {text.num_layers + text.num_multimodal_layers}), "
        f"--num-tokens {loaded.description.num_tokens}"
    )
    return loaded, f"{report}\n{assumed}"


def _write_for_authors(loaded: LoadedModel, path: Path) -> str:
    """Writes the file; returns what is needed to read it back, as weights do not tell every size."""
    description = loaded.description
    named = to_reference(loaded.model.state_dict(), description.task, description.model.text.num_layers)
    torch.save({name: tensor.contiguous() for name, tensor in named.items()}, path)
    read_back = ForeignFile(path, description.task, named).config()
    unlike = changes(read_back.model_dump(mode="json"), description.model.model_dump(mode="json"))
    irrelevant = ("temperature", "text.pretrained", "video.pretrained")  # Only matter to a fresh model.
    told = [change for change in unlike if not change.startswith(irrelevant)]
    return "to read it back with `alpro export`: " + (" ".join(told) or "no sizes need to be given")


def _only_for_files(options: ExportOptions) -> Sequence[str]:
    """Options that were given and mean nothing for a folder, as they are written."""
    given = [name for name in sorted(options.model_fields_set) if name != "format" and getattr(options, name)]
    return ["key=value" if name == "sizes" else "--" + name.replace("_", "-") for name in given]
