"""`alpro export`: any trained or released model as a folder for use, or as a file for the authors' code."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from alpro_stream.config import Config, changes
from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.evaluate.words import load_words
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
