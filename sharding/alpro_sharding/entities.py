"""Nouns of captions, which become the entity vocabulary.

They are found by TextBlob's pattern tagger, which needs no download, by spaCy when its model is installed, or are those
of a file. The driver decides once (`noun_options`); workers that have other versions refuse, since mixed ones would
make the vocabulary depend on which machine read a caption.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from textblob.en.taggers import PatternTagger

from alpro_sharding.lemmas import singular
from alpro_stream.config import Config
from alpro_stream.errors import ConfigError, ShardError
from alpro_stream.shards.entities import Entities, merge_entities

# Nouns that name the medium, a position, an amount or nothing in particular: no crop shows them.
_VAGUE = """
video videos footage clip clips film movie shot scene scenery view image images picture photo photograph photography
close closeup background foreground front back side top bottom middle center centre left right end edge part piece
corner line row pair group set couple lot bit kind type sort way thing something anything nothing everything someone
anyone everyone nobody everybody one ones other others thousand hundred dozen number amount time day moment second
minute hour today tomorrow yesterday place position direction use case fact name word example
"""
VAGUE_NOUNS = frozenset(_VAGUE.split())

CountNouns = Callable[[Iterable[str]], Counter[str]]

# Hyphens and apostrophes part words: "T-shirt" is "t shirt", "dog's" holds "dog".
_WORD = re.compile(r"[^\W_]+")
_MAX_ENTRY_CHARS = 100
_MAX_NOUN_CHARS = 40


class EntityConfig(Config):
    """The entity vocabulary: the most frequent nouns of the captions, or those of a file."""

    num: int = Field(default=1000, ge=1)
    """Most nouns of the vocabulary; a `file` is taken whole."""
    tagger: Literal["auto", "pattern", "spacy"] = "auto"
    """What finds nouns: `pattern` needs no download, `spacy` needs its package and a model on every node; `auto` takes
    spaCy when both are installed where the job is started."""
    spacy_model: str = "en_core_web_sm"
    """Name of an installed spaCy model, or a folder with one that all nodes see."""
    file: str | None = None
    """A text file with one noun or phrase a line; the vocabulary is exactly these, counted in the captions."""
    stop_words: tuple[str, ...] = ()
    """Nouns to leave out, besides those that no picture shows ("background", "moment"); a `file` ignores them."""


@dataclass(frozen=True, slots=True)
class NounOptions:
    """How nouns are counted, decided once for all workers; plain values, part of the plan of a shard set.

    Attributes:
        tagger: ``pattern``, ``spacy`` or ``file``.
        spacy_model: name or folder of the model; None for the others.
        versions: of the packages, and of the model, that decide the result.
        stop_words: nouns to leave out besides `VAGUE_NOUNS`, lower case, in alphabetical order.
        words: the vocabulary, when it comes from a file.
    """

    tagger: Literal["pattern", "spacy", "file"]
    spacy_model: str | None
    versions: dict[str, str]
    stop_words: tuple[str, ...]
    words: tuple[str, ...] | None


def noun_options(config: EntityConfig) -> NounOptions:
    """Decides how nouns are counted, from what is installed here.

    Raises:
        ConfigError: spaCy or its model is wanted and not installed, or the file cannot be used.
    """
    tagger: Literal["pattern", "spacy", "file"]
    words = None
    if config.file is not None:
        tagger, words = "file", _read_words(config.file)
    elif config.tagger == "auto":
        tagger = "pattern" if _missing_for_spacy(config.spacy_model) else "spacy"
    else:
        tagger = config.tagger
    if tagger == "spacy" and (missing := _missing_for_spacy(config.spacy_model)):
        raise ConfigError(f"entities.tagger is 'spacy', and {missing}, or set entities.tagger=pattern")
    return NounOptions(
        tagger=tagger,
        spacy_model=config.spacy_model if tagger == "spacy" else None,
        versions=_versions(tagger, config.spacy_model),
        # No part of the plan of a vocabulary that they do not change.
        stop_words=() if tagger == "file" else tuple(sorted({word.strip().lower() for word in config.stop_words})),
        words=words,
    )


def noun_counter(options: NounOptions) -> CountNouns:
    """A function that counts the nouns of captions by their singular: "Two dogs on the grass" gives dog and grass.

    Of spaCy's tags NOUN counts, PROPN does not: names of people and places are no entities that a crop shows.

    Raises:
        ShardError: the versions here are not those of the options, or the spaCy model cannot be loaded.
    """
    found = _versions(options.tagger, options.spacy_model or "")
    if found != options.versions:
        raise ShardError(
            f"this machine counts nouns with {_spell(found)}, the run was planned with {_spell(options.versions)}; "
            f"install the same versions on every node"
        )
    if options.words is not None:
        return _PhraseCounter(options.words)
    nouns = _spacy_nouns(options.spacy_model) if options.spacy_model is not None else _pattern_nouns
    return _NounCounter(nouns, VAGUE_NOUNS.union(options.stop_words))


def vocabulary(counts: Mapping[str, int], config: EntityConfig) -> Entities:
    """The entity vocabulary, from the counts of all captions: the most frequent first, ties by the alphabet.

    Raises:
        ConfigError: the file of the config cannot be used.
    """
    if config.file is None:
        return merge_entities([counts.items()], config.num)
    return merge_entities([((word, counts.get(word, 0)) for word in _read_words(config.file))])


class _NounCounter:
    """Counts what a tagger finds, vague nouns and scraps left out."""

    def __init__(self, nouns: Callable[[Iterable[str]], Iterable[str]], stop_words: frozenset[str]) -> None:
        self._nouns = nouns
        self._stop_words = stop_words

    def __call__(self, captions: Iterable[str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        # Lower case first: taggers take a capitalised first word for a name.
        for word in self._nouns(caption.lower() for caption in captions):
            if _is_plain_word(word) and word not in self._stop_words:
                lemma = singular(word)
                if lemma not in self._stop_words:
                    counts[lemma] += 1
        return counts


class _PhraseCounter:
    """Counts given words and phrases; at each place of a caption the longest that fits, in singular or plural."""

    def __init__(self, words: Iterable[str]) -> None:
        self._entries: dict[tuple[str, ...], list[str]] = {}
        for word in words:
            self._entries.setdefault(_lemmas(word), []).append(word)
        self._lengths = sorted({len(entry) for entry in self._entries}, reverse=True)

    def __call__(self, captions: Iterable[str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for caption in captions:
            lemmas = _lemmas(caption)
            place = 0
            while place < len(lemmas):
                place += self._count_at(lemmas, place, counts)
        return counts

    def _count_at(self, lemmas: tuple[str, ...], place: int, counts: Counter[str]) -> int:
        """Counts what begins at a place; gives the words to go on by."""
        for length in self._lengths:
            found = self._entries.get(lemmas[place : place + length])
            if found is not None:
                counts.update(found)
                return length
        return 1


def _pattern_nouns(captions: Iterable[str]) -> Iterable[str]:
    for caption in captions:
        for word, tag in _pattern_tagger().tag(caption):
            if tag.startswith("NN"):
                yield word


@cache
def _pattern_tagger() -> PatternTagger:
    return PatternTagger()


@cache
def _spacy_nouns(model: str) -> Callable[[Iterable[str]], Iterable[str]]:
    import spacy

    try:
        # The parts that find names and grammar cost most of the time and are not needed.
        pipeline = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    except Exception as error:  # whatever a damaged or foreign model runs into
        raise ShardError(f"the spaCy model {model} cannot be loaded here: {error}") from error

    def nouns(captions: Iterable[str]) -> Iterable[str]:
        for document in pipeline.pipe(captions):
            for token in document:
                if token.pos_ == "NOUN":
                    yield token.text

    return nouns


def _is_plain_word(word: str) -> bool:
    letters = word.replace("-", "")
    return 3 <= len(word) <= _MAX_NOUN_CHARS and letters.isascii() and letters.isalpha()


def _lemmas(text: str) -> tuple[str, ...]:
    return tuple(singular(word) for word in _WORD.findall(text.lower()))


def _read_words(path: str) -> tuple[str, ...]:
    """The entries of a vocabulary file: white space made single, empty lines and repetitions left out."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"entities.file {path} cannot be read: {reason}; expected UTF-8, one noun a line") from error
    words = dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip())
    for word in words:
        if len(word) > _MAX_ENTRY_CHARS or not _WORD.search(word):
            raise ConfigError(f"entities.file {path} holds {word[:60]!r}; expected one noun or short phrase a line")
    if not words:
        raise ConfigError(f"entities.file {path} is empty; expected one noun a line")
    return tuple(words)


def _missing_for_spacy(model: str) -> str | None:
    """What is not installed of spaCy and a model, and what to do.

    Found without importing spaCy, which takes seconds.
    """
    if _version("spacy") is None:
        return "spaCy is not installed; run `pip install spacy`"
    if _model_version(model) is None:
        hint = "run `python -m spacy download en_core_web_sm`, name another"
        return f"its model {model!r} is neither installed nor a folder with a meta.json; {hint}"
    return None


def _versions(tagger: str, spacy_model: str) -> dict[str, str]:
    packages = {"pattern": ("simplemma", "textblob"), "spacy": ("simplemma", "spacy"), "file": ("simplemma",)}[tagger]
    versions = {package: _version(package) or "none" for package in packages}
    if tagger == "spacy":
        versions["model"] = _model_version(spacy_model) or "none"
    return versions


def _model_version(model: str) -> str | None:
    folder = Path(model)
    if not folder.is_dir():
        return _version(model)
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return f"{meta['lang']}_{meta['name']} {meta['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return None


def _spell(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
