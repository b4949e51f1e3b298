"""The corpus as files: clips, a manifest with captions and questions, and what each clip shows.

::

    OUT/
        videos/SPLIT/SPLIT-000000.mp4
        manifest.jsonl    what `alpro shard` reads
        scenes.jsonl      {"id", "split", "scene"}: what each clip shows (`scene.Scene`)
        foils.jsonl       {"id", "split", "group", "captions", "answer"}: captions of held-out clips, one of them true
        cloze.jsonl       {"id", "split", "text", "word"}: sentences of held-out clips, and the word to hide in them
        objects.jsonl     {"id", "split", "objects": [{"word", "boxes"}]}: where things are in held-out clips, for each
                          frame (top, left, height, width) as shares of its sides, null where they are not seen
        corpus.json       the configuration; written last, its presence says that the corpus is whole
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alpro_stream.config import Config, differences, validate
from alpro_stream.errors import ConfigError
from alpro_stream.media.killable import end_with
from alpro_stream.shards.storage import publish_bytes
from alpro_stream.testing.glyphs.captions import (
    CaptionConfig,
    complete_caption,
    draw_caption,
    foils,
    questions,
    single_facts,
)
from alpro_stream.testing.glyphs.render import draw_frames, write_mp4
from alpro_stream.testing.glyphs.scene import Scene, SceneConfig, Thing, boxes, draw_scene
from alpro_stream.testing.glyphs.vocabulary import COLOURS, NOUNS, TILE_SIDE

CORPUS_FILE = "corpus.json"
MANIFEST_FILE = "manifest.jsonl"
SCENES_FILE = "scenes.jsonl"
FOILS_FILE = "foils.jsonl"
CLOZE_FILE = "cloze.jsonl"
OBJECTS_FILE = "objects.jsonl"

Split = Literal["train", "validation", "test"]
# Draws of a clip whose caption is new, before the split counts as one that cannot be filled.
_MAX_TRIES = 500


class CorpusConfig(Config):
    """A generated corpus; the same configuration gives the same clips."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file."""
    out: Path
    """Folder of the corpus."""
    seed: int = Field(default=0, ge=0)
    """Of every draw but the glyphs', which never change."""
    num_clips: dict[Split, int] = Field(default={"train": 8000, "validation": 256, "test": 512})
    """Clips of each split."""
    num_nouns: int = Field(default=24, ge=4)
    """Nouns that objects have."""
    num_colours: int = Field(default=6, ge=2)
    """Colours that objects have."""
    long_tail: float = Field(default=0.0, ge=0, le=4)
    """Zipf's exponent: the r-th noun is drawn with weight r ** -long_tail. 0 makes all as frequent."""
    held_out: int = Field(default=8, ge=4)
    """One in so many pairs of noun and colour is kept for the test split, as many for validation. Each clip of these
    has a mover with such a pair, and no clip of another split has one."""
    repeat_captions: bool = False
    """Let clips have the same caption; else all captions of a split are different, as retrieval needs them."""
    cell_px: int = Field(default=16, ge=TILE_SIDE, multiple_of=TILE_SIDE)
    """Side of an object's cell in pixels; a frame is four cells wide."""
    questions_per_clip: int = Field(default=4, ge=1)
    """Questions with answers of each clip: of all that can be asked, one of each kind before a second of any."""
    asked: tuple[str, ...] = ()
    """Beginnings of the questions that are asked, such as `where is`; nothing: all."""
    scene: SceneConfig = SceneConfig()
    """What may happen."""
    captions: CaptionConfig = CaptionConfig()
    """How much training captions say."""

    @model_validator(mode="after")
    def _has_what_it_takes(self) -> Self:
        for name, wanted, there in (
            ("num_nouns", self.num_nouns, len(NOUNS)),
            ("num_colours", self.num_colours, len(COLOURS)),
        ):
            if wanted > there:
                raise ValueError(f"{name} {wanted} is more than the {there} that there are: ask for {there} at most")
        empty = [split for split, number in self.num_clips.items() if number < 1]
        if empty:
            raise ValueError(f"num_clips.{empty[0]} is {self.num_clips[empty[0]]}: leave a split out, or ask for clips")
        pairs = product(range(self.num_nouns), range(self.num_colours))
        splits = {split_of(noun, colour, self.held_out) for noun, colour in pairs}
        if lacking := [split for split in self.num_clips if split not in splits]:
            raise ValueError(
                f"held_out {self.held_out} leaves no pair of {self.num_nouns} nouns and {self.num_colours} colours for "
                f"num_clips.{lacking[0]}: there are too few combinations; ask for a smaller held_out, or more of them"
            )
        return self


@dataclass(frozen=True)
class Clip:
    """One clip with what is said of it."""

    id: str
    split: Split
    number: int
    scene: Scene
    caption: str
    questions: tuple[tuple[str, str], ...]

    @property
    def media(self) -> str:
        """Path inside the corpus."""
        return f"videos/{self.split}/{self.id}.mp4"


def clips_of(config: CorpusConfig, split: Split) -> Iterator[Clip]:
    """All clips of a split, in their order.

    Raises:
        ConfigError: there are not so many different captions.
    """
    seen = set[str]()
    is_training = split == "train"
    draw_things = partial(_draw_things, config, split)
    for number in range(config.num_clips[split]):
        random = Random(f"{config.seed}/{split}/{number}")
        for _ in range(_MAX_TRIES):
            scene = draw_scene(random, config.scene, draw_things, complete=not is_training)
            caption = draw_caption(random, scene, config.captions) if is_training else complete_caption(scene)
            if config.repeat_captions or caption not in seen:
                break
        else:
            raise ConfigError(
                f"num_clips.{split} is {config.num_clips[split]}, and after {number} clips no new caption was found in "
                f"{_MAX_TRIES} draws: there are too few combinations. Ask for fewer clips, for more nouns or colours"
                + ("" if is_training else ", for a smaller held_out")
                + ", or set repeat_captions=true"
            )
        seen.add(caption)
        wanted = [
            one for one in questions(scene, config.num_colours) if not config.asked or one[0].startswith(config.asked)
        ]
        asked = _one_of_each_kind_first(random, wanted)
        yield Clip(f"{split}-{number:06}", split, number, scene, caption, asked[: config.questions_per_clip])


def _one_of_each_kind_first(random: Random, asked: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Shuffled; else counts and colours, of which a clip has many, would be most of what is asked."""
    before = Counter[str]()
    ranked = list[tuple[int, tuple[str, str]]]()
    for question, answer in random.sample(asked, len(asked)):
        kind = " ".join(question.split()[:2])
        ranked.append((before[kind], (question, answer)))
        before[kind] += 1
    return tuple(pair for _, pair in sorted(ranked, key=lambda ranked: ranked[0]))


def split_of(noun: int, colour: int, held_out: int) -> Split:
    """The split that a pair of noun and colour belongs to."""
    rest = (noun + colour) % held_out
    return "test" if rest == 0 else "validation" if rest == held_out // 2 else "train"


def write_corpus(config: CorpusConfig, num_processes: int | None = None) -> Path:
    """Writes a corpus; one that is there and whole is left as it is. Returns its manifest.

    Args:
        config: which.
        num_processes: that draw and encode clips; None takes one a core.

    Raises:
        ConfigError: the folder holds another corpus, or something else; or a split cannot be filled.
    """
    if _is_there(config):
        return config.out / MANIFEST_FILE
    clips = [clip for split in config.num_clips for clip in clips_of(config, split)]
    for split in config.num_clips:
        (config.out / "videos" / split).mkdir(parents=True, exist_ok=True)
    # A fresh interpreter: one that was forked may hang in a library that has threads.
    workers = ProcessPoolExecutor(
        num_processes or len(os.sched_getaffinity(0)),
        mp_context=get_context("spawn"),
        initializer=end_with,  # Else they wait for ever for a process that was killed.
        initargs=(os.getpid(),),
    )
    with workers as pool:
        for _ in pool.map(partial(_write_clip, config), clips, chunksize=64):
            pass
    _write_lines(config.out / MANIFEST_FILE, map(_manifest_row, clips))
    _write_rows(config.out / SCENES_FILE, ((clip, {"scene": clip.scene.model_dump(mode="json")}) for clip in clips))
    held_out = [clip for clip in clips if clip.split != "train"]

    def is_seen(thing: Thing) -> bool:
        return split_of(thing.noun, thing.colour, config.held_out) == "train"

    asked = ((clip, foil.model_dump(mode="json")) for clip in held_out for foil in foils(clip.scene, is_seen))
    _write_rows(config.out / FOILS_FILE, asked)
    facts = ((clip, {"text": text, "word": word}) for clip in held_out for text, word in single_facts(clip.scene))
    _write_rows(config.out / CLOZE_FILE, facts)
    _write_rows(config.out / OBJECTS_FILE, ((clip, {"objects": _objects(clip.scene)}) for clip in held_out))
    text = json.dumps(_settings(config), indent=1, ensure_ascii=False)
    publish_bytes(config.out / CORPUS_FILE, f"{text}\n".encode())
    return config.out / MANIFEST_FILE


def read_scenes(corpus: Path) -> dict[str, Scene]:
    """What each clip of a written corpus shows, by its id.

    Raises:
        ConfigError: there is no corpus.
    """
    path = corpus / SCENES_FILE
    if not path.is_file():
        raise ConfigError(f"no {path}: give the folder of a corpus that `alpro corpus` wrote")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: Scene.model_validate(row["scene"]) for row in rows}


def read_corpus_config(corpus: Path) -> CorpusConfig:
    """How a written corpus was made.

    Raises:
        ConfigError: there is none, or its description is damaged.
    """
    path = corpus / CORPUS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give the folder of `alpro corpus`") from error
    return validate(CorpusConfig, {**values, "out": corpus}, source=str(path))


def _is_there(config: CorpusConfig) -> bool:
    if (config.out / CORPUS_FILE).is_file():
        if unlike := differences(_settings(read_corpus_config(config.out)), _settings(config)):
            raise ConfigError(
                f"{config.out} holds another corpus ({'; '.join(unlike)}): choose another `out`, or remove it"
            )
        return True
    # What an interrupted run left is written anew.
    found = {entry.name for entry in config.out.iterdir()} if config.out.is_dir() else set[str]()
    if strangers := found - {"videos", MANIFEST_FILE, SCENES_FILE, FOILS_FILE, CLOZE_FILE, OBJECTS_FILE}:
        raise ConfigError(f"{config.out} holds other files, such as {min(strangers)}: choose another `out`")
    shutil.rmtree(config.out / "videos", ignore_errors=True)
    return False


def _settings(config: CorpusConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"work_dir", "out"})


def _write_clip(config: CorpusConfig, clip: Clip) -> None:
    number = {"train": 0, "validation": 1, "test": 2}[clip.split]
    frames = draw_frames(clip.scene, config.cell_px, (config.seed, number, clip.number))
    write_mp4(config.out / clip.media, frames)


def _manifest_row(clip: Clip) -> dict[str, Any]:
    asked = [{"question": question, "answer": answer} for question, answer in clip.questions]
    row = {"id": clip.id, "media": clip.media, "captions": [clip.caption], "qa": asked}
    return {**row, "split": clip.split, "kind": "video"}


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [{"word": NOUNS[thing.noun], "boxes": places} for thing, places in boxes(scene)]


def _write_rows(path: Path, rows: Iterable[tuple[Clip, Mapping[str, Any]]]) -> None:
    _write_lines(path, ({"id": clip.id, "split": clip.split, **more} for clip, more in rows))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _draw_things(config: CorpusConfig, split: Split, random: Random, number: int) -> list[Thing]:
    """Of pairs of the training split, but for held-out clips one mover's, which is of a pair of theirs."""
    movers = config.scene.num_movers
    special = random.randrange(movers) if split != "train" else None
    things = list[Thing]()
    while len(things) < number:
        wanted = split if len(things) == special else "train"
        thing = _draw_thing(config, wanted, random)
        if thing.noun not in {other.noun for other in things}:
            things.append(thing)
    return things


def _draw_thing(config: CorpusConfig, split: Split, random: Random) -> Thing:
    weights = list(accumulate((rank + 1) ** -config.long_tail for rank in range(config.num_nouns)))
    while True:
        noun = random.choices(range(config.num_nouns), cum_weights=weights)[0]
        colour = random.randrange(config.num_colours)
        if split_of(noun, colour, config.held_out) == split:
            return Thing(noun=noun, colour=colour)
