"""The generated corpus: the same everywhere, splits that share no pair, and nothing said that is not true."""

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from alpro_sharding.entities import EntityConfig, noun_counter, noun_options
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.testing.glyphs.captions import CaptionConfig, foils, questions, single_facts
from alpro_stream.testing.glyphs.corpus import CorpusConfig, clips_of, read_scenes, split_of, write_corpus
from alpro_stream.testing.glyphs.render import draw_frames
from alpro_stream.testing.glyphs.scene import NUM_FRAMES, Scene
from alpro_stream.testing.glyphs.vocabulary import ANIMALS, COLOURS, NOUNS, glyphs

_SMALL = {"train": 24, "validation": 6, "test": 6}
_MANY = {"train": 600, "validation": 64, "test": 128}
_KINDS = {
    "turns": {},
    "enter_and_leave": {"presence": "enter_and_leave"},
    "one_mover": {"num_movers": 1, "with_corner": False, "path_cells": 3},
    "long_tail": {},
}
_MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def _config(out: Path = Path("unused"), kind: str = "turns", **more: object) -> CorpusConfig:
    values = {"out": out, "num_clips": _MANY, "scene": _KINDS[kind], "long_tail": 1.0 if kind == "long_tail" else 0.0}
    if kind == "one_mover":
        values |= {"repeat_captions": True, "held_out": 4}
    return validate(CorpusConfig, {**values, **more}, source="test")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyphs") / "corpus"
    write_corpus(_config(folder, num_clips=_SMALL), num_processes=2)
    return folder


def test_a_corpus_is_the_same_file_by_file_with_any_number_of_processes(written: Path, tmp_path: Path) -> None:
    write_corpus(_config(tmp_path / "again", num_clips=_SMALL), num_processes=1)
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*.*"))
    assert len(names) == sum(_SMALL.values()) + 6
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes(), name


def test_another_seed_gives_other_clips_of_the_same_glyphs() -> None:
    first, second = (list(clips_of(_config(seed=seed), "test")) for seed in (0, 1))
    assert not {clip.caption for clip in first} & {clip.caption for clip in second}
    seeds = [draw_frames(first[0].scene, 8, (seed, 0, 0)) for seed in (0, 1)]
    assert not np.array_equal(*seeds)


def test_glyphs_can_be_told_apart_and_mirror_themselves() -> None:
    found = glyphs()
    assert len(found) == len(NOUNS) == len(set(NOUNS))
    assert np.array_equal(found, found[:, :, ::-1])
    distances = (found[:, None] != found[None]).sum(axis=(2, 3))
    assert distances[~np.eye(len(found), dtype=bool)].min() >= 14
    lit = found.sum(axis=(1, 2))
    assert lit.min() >= 20
    assert lit.max() <= 34


@pytest.mark.parametrize("kind", _KINDS)
def test_splits_share_no_pair_of_noun_and_colour_where_it_counts(kind: str) -> None:
    config = _config(kind=kind)
    for split in _MANY:
        for clip in clips_of(config, split):
            pairs = [split_of(thing.noun, thing.colour, config.held_out) for thing in clip.scene.things()]
            movers = [split_of(m.thing.noun, m.thing.colour, config.held_out) for m in clip.scene.movers]
            if split == "train":
                assert set(pairs) == {"train"}
            else:
                assert movers.count(split) == 1
                assert Counter(pairs) - Counter([split]) == Counter({"train": len(pairs) - 1})


@pytest.mark.parametrize("kind", ["turns", "enter_and_leave", "long_tail"])
def test_all_captions_of_a_split_are_different(kind: str) -> None:
    for split, number in _MANY.items():
        captions = {clip.caption for clip in clips_of(_config(kind=kind), split)}
        assert len(captions) == number


def test_training_clips_show_one_to_three_objects_and_held_out_ones_all() -> None:
    config = _config()
    shares = Counter(len(clip.scene.things()) for clip in clips_of(config, "train"))
    assert all(abs(shares[number] / 600 - share) < 0.08 for number, share in ((1, 0.25), (2, 0.35), (3, 0.40)))
    assert {len(clip.scene.things()) for clip in clips_of(config, "test")} == {3}


def test_a_long_tail_makes_first_nouns_frequent() -> None:
    counts = Counter(
        thing.noun for clip in clips_of(_config(kind="long_tail"), "train") for thing in clip.scene.things()
    )
    first, last = (sum(counts[noun] for noun in nouns) for nouns in (range(4), range(20, 24)))
    assert first > 4 * last


def test_of_each_clip_different_kinds_of_questions_are_asked() -> None:
    for clip in clips_of(_config(kind="turns"), "train"):
        kinds = {" ".join(question.split()[:2]) for question, _ in questions(clip.scene)}
        asked = {" ".join(question.split()[:2]) for question, _ in clip.questions}
        assert len(asked) == min(len(kinds), len(clip.questions)), clip.questions


def test_only_what_is_wanted_is_asked_and_nothing_else_changes() -> None:
    config, some = _config(kind="turns"), _config(kind="turns", asked=("where is", "how many"))
    for clip, other in zip(clips_of(config, "train"), clips_of(some, "train"), strict=True):
        assert (clip.scene, clip.caption) == (other.scene, other.caption)
        possible = {one for one in questions(clip.scene) if one[0].startswith(("where is", "how many"))}
        assert set(other.questions) <= possible
        assert len(other.questions) == min(config.questions_per_clip, len(possible))


@pytest.mark.parametrize("kind", _KINDS)
def test_everything_that_is_said_is_true(kind: str) -> None:
    config = _config(kind=kind)
    for split in _MANY:
        for clip in clips_of(config, split):
            assert _is_true(clip.caption, clip.scene), (clip.caption, clip.scene)
            for question, answer in questions(clip.scene):
                assert answer == _answer(question, clip.scene), (question, answer, clip.scene)
            assert set(clip.questions) <= set(questions(clip.scene))
            for text, word in single_facts(clip.scene):
                assert _is_true(text, clip.scene)
                others = [noun for noun in NOUNS[: config.num_nouns] if noun != word]
                assert not any(_is_true(text.replace(word, noun), clip.scene) for noun in others)


@pytest.mark.parametrize("kind", _KINDS)
def test_of_foils_one_alone_is_true(kind: str) -> None:
    config = _config(kind=kind)
    for clip in clips_of(config, "test"):
        found = foils(clip.scene, lambda thing: split_of(thing.noun, thing.colour, config.held_out) == "train")
        assert found[0].group == "direction"
        for foil in found:
            if foil.group == "binding":  # Else what was read in training would tell.
                unseen = [_num_unseen(caption) for caption in foil.captions]
                assert unseen[0] == unseen[1] == 1
            assert [_is_true(caption, clip.scene) for caption in foil.captions].index(True) == foil.answer
            assert sum(_is_true(caption, clip.scene) for caption in foil.captions) == 1
            assert len(set(foil.captions)) == len(foil.captions) == (4 if foil.group == "direction" else 2)


def test_captions_say_as_much_as_they_are_asked_to() -> None:
    says_all = CaptionConfig(short=0, colour=1, both_movers=1, corner=1)
    clips = list(clips_of(_config(captions=says_all), "train"))
    named = [len(re.findall("|".join(COLOURS), clip.caption)) for clip in clips]
    assert named == [len(clip.scene.things()) for clip in clips]
    short = clips_of(_config(captions=CaptionConfig(short=1, short_colour=0), num_clips={"train": 300}), "train")
    assert all(not re.search("|".join(COLOURS), clip.caption) and " goes " not in clip.caption for clip in short)


def test_pixels_show_the_scene(written: Path) -> None:
    """Of the decoded files: each object has its colour where it should be, and what is not there leaves no trace."""
    scenes = read_scenes(written)
    for id_, scene in list(scenes.items())[::3]:
        path = next(written.rglob(f"{id_}.mp4"))
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == NUM_FRAMES
        for number in (0, 5, 10, 15):
            places = scene.places(number)
            for thing, (row, column) in places:
                mask = glyphs()[thing.noun].repeat(2, axis=0).repeat(2, axis=1)
                top, left = round(row * 16), round(column * 16)
                tile = frames[number][top : top + 14, left : left + 14][mask].astype(float)
                wanted = np.array(list(COLOURS.values())[thing.colour])
                nearest = min(range(6), key=lambda c: np.abs(tile.mean(0) - np.array(list(COLOURS.values())[c])).sum())
                assert nearest == thing.colour, (id_, number, tile.mean(0), wanted)


@pytest.mark.parametrize("kind", _KINDS)
def test_nothing_is_drawn_but_what_is_there(kind: str) -> None:
    """Beside a clip without objects: other pixels are those of the objects' tiles alone, in each frame."""
    for clip in list(clips_of(_config(kind=kind), "test"))[:20]:
        shown, empty = (draw_frames(scene, 8, (1, 2)) for scene in (clip.scene, Scene(movers=(), still=None)))
        for number in range(NUM_FRAMES):
            expected = empty[number].copy()
            for thing, (row, column) in clip.scene.places(number):
                top, left = round(row * 8), round(column * 8)
                tile, seen = expected[top : top + 7, left : left + 7], shown[number][top : top + 7, left : left + 7]
                mask = glyphs()[thing.noun]
                assert (tile[mask] != seen[mask]).any()
                tile[mask] = seen[mask]
            assert np.array_equal(expected, shown[number])


def test_movements_go_where_they_should() -> None:
    for kind in _KINDS:
        for clip in list(clips_of(_config(kind=kind), "test"))[:40]:
            for mover in clip.scene.movers:
                places = [place for frame in range(NUM_FRAMES) if (place := mover.place(frame))]
                down, right = (end - start for start, end in zip(places[0], places[-1], strict=True))
                way = _MOVES[mover.direction]
                assert (down, right) == (way[0] * mover.path_cells, way[1] * mover.path_cells)
                assert all(0 <= row <= 3 and 0 <= column <= 3 for row, column in places)


def test_objects_come_and_go_one_after_the_other() -> None:
    for clip in clips_of(_config(kind="enter_and_leave"), "test"):
        first, second = clip.scene.movers
        assert first.leaves - first.enters == second.leaves - second.enters == 6
        assert first.leaves <= second.enters + 4
        assert first.place(first.enters - 1) is None
        assert first.place(first.leaves) is None
        assert all(place == (int(place[0]), int(place[1])) for f in range(16) if (place := first.place(f)))


def test_nouns_of_the_captions_are_the_vocabulary() -> None:
    """By the tagger that `alpro shard` uses by default; a portrait is what its configuration leaves out."""
    config = _config(num_nouns=len(NOUNS), num_clips={"train": 3000})
    counted = noun_counter(noun_options(EntityConfig(tagger="pattern", stop_words=("portrait",))))(
        clip.caption for clip in clips_of(config, "train")
    )
    assert set(counted) == set(NOUNS)


def test_a_killed_corpus_leaves_no_process_behind(tmp_path: Path) -> None:
    config = tmp_path / "corpus.yaml"
    config.write_text(f"out: {tmp_path}/corpus\nnum_clips: {{train: 5000}}\n")
    process = subprocess.Popen([sys.executable, "-m", "alpro_launch.cli", "corpus", str(config)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.mp4")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_a_corpus_that_is_there_is_left_alone(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_corpus(_config(written, num_clips=_SMALL))
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_another_corpus_in_the_folder_is_refused(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds another corpus \(seed.*choose another `out`"):
        write_corpus(_config(written, num_clips=_SMALL, seed=3))


def test_a_folder_with_other_files_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files, such as thesis\.txt"):
        write_corpus(_config(tmp_path))


def test_what_an_interrupted_run_left_is_written_anew(written: Path, tmp_path: Path) -> None:
    (tmp_path / "videos" / "train").mkdir(parents=True)
    (tmp_path / "videos" / "train" / "stale.mp4").write_bytes(b"half")
    (tmp_path / "manifest.jsonl").write_text("half")
    write_corpus(_config(tmp_path, num_clips=_SMALL))
    assert not list(tmp_path.rglob("stale.mp4"))
    assert (tmp_path / "manifest.jsonl").read_bytes() == (written / "manifest.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_nouns": 65}, "num_nouns 65 is more than the 6. that there are"),
        ({"num_colours": 7}, "num_colours 7 is more than the 6"),
        ({"num_clips": {"test": 0}}, "num_clips.test is 0"),
        ({"num_clips": {"dev": 5}}, "dev"),
        ({"held_out": 64}, "held_out 64 leaves no pair of 24 nouns and 6 colours for num_clips.validation"),
        ({"cell_px": 12}, "cell_px"),
        ({"scene": {"kept": (0.0, 0.0, 1.0), "with_corner": False}}, r"kept \[0.0, 0.0, 1.0\]: expected weights"),
        ({"scene": {"kept": (0.5, -0.5, 1.0)}}, r"kept .* not negative"),
        ({"scene": {"kept": ()}}, r"kept \[\]"),
    ],
)
def test_what_cannot_be_made_is_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**more)


def test_a_split_with_too_few_combinations_is_refused() -> None:
    config = _config(kind="one_mover", num_clips={"test": 5000}, num_nouns=6, repeat_captions=False)
    with pytest.raises(ConfigError, match=r"num_clips.test is 5000, and after \d+ clips no new caption"):
        list(clips_of(config, "test"))
    config = _config(kind="one_mover", num_clips={"train": 5000}, repeat_captions=False)
    with pytest.raises(ConfigError, match="set repeat_captions=true"):
        list(clips_of(config, "train"))


def _is_true(caption: str, scene: Scene) -> bool:
    """Reads a caption by itself, knowing nothing of how captions are made."""
    caption = caption.removesuffix(".")
    moving, _, corner = caption.partition(" with ")
    if corner or re.search(r" in the \w+ \w+ corner$", moving):
        corner, moving = corner or moving, moving if corner else ""
        match = re.fullmatch(r"a (?:(\w+) )?(\w+) in the (\w+ \w+) corner", corner)
        assert match, caption
        still = scene.still
        if not still or not _fits(still.thing, match[1], match[2]) or still.corner != match[3]:
            return False
        where = (0 if match[3].startswith("top") else 3, 0 if match[3].endswith("left") else 3)
        if where != still.cell():
            return False
    if not moving:
        return True
    if " goes " not in moving:
        match = re.fullmatch(r"(?:.* )?(?:a|the|one) (?:(\w+) )?(\w+)", moving)
        assert match, caption
        colour = match[1] if match[1] in COLOURS else None
        return any(_fits(thing, colour, match[2]) for thing in scene.things())
    said = [re.fullmatch(r"a (?:(\w+) )?(\w+) goes (\w+)", part) for part in moving.split(" then ")]
    assert all(said), caption
    numbers = [
        next((n for n, m in enumerate(scene.movers) if _fits(m.thing, s[1], s[2]) and _goes(m) == s[3]), None)
        for s in said
        if s
    ]
    return None not in numbers and numbers == sorted(numbers) and len(set(numbers)) == len(numbers)


def _num_unseen(caption: str) -> int:
    pairs = re.findall(rf"({'|'.join(COLOURS)}) (\w+)", caption)
    return sum(split_of(NOUNS.index(noun), list(COLOURS).index(colour), 8) != "train" for colour, noun in pairs)


def _goes(mover) -> str:  # type: ignore[no-untyped-def]
    places = [place for frame in range(NUM_FRAMES) if (place := mover.place(frame))]
    down, right = np.sign(places[-1][0] - places[0][0]), np.sign(places[-1][1] - places[0][1])
    return next(name for name, way in _MOVES.items() if way == (down, right))


def _fits(thing, colour: str | None, noun: str) -> bool:  # type: ignore[no-untyped-def]
    return NOUNS[thing.noun] == noun and (not colour or list(COLOURS)[thing.colour] == colour)


def _answer(question: str, scene: Scene) -> str:
    def thing_of(noun: str):  # type: ignore[no-untyped-def]
        (found,) = [thing for thing in scene.things() if NOUNS[thing.noun] == noun]
        return found

    def asked(thing) -> str:  # type: ignore[no-untyped-def]
        assert question.startswith("who") == (NOUNS[thing.noun] in ANIMALS)
        return NOUNS[thing.noun]

    if match := re.fullmatch(r"(?:what|who) is in the (\w+ \w+) corner", question):
        assert scene.still
        assert scene.still.corner == match[1]
        return asked(scene.still.thing)
    if match := re.fullmatch(r"(?:what|who) goes (\w+)", question):
        (mover,) = [mover for mover in scene.movers if _goes(mover) == match[1]]
        return asked(mover.thing)
    if match := re.fullmatch(r"where is the (\w+)", question):
        assert scene.still
        assert scene.still.thing == thing_of(match[1])
        return scene.still.corner
    if match := re.fullmatch(r"(where|when) does the (\w+) go", question):
        (number,) = [n for n, mover in enumerate(scene.movers) if mover.thing == thing_of(match[2])]
        return _goes(scene.movers[number]) if match[1] == "where" else ("first", "last")[number]
    if match := re.fullmatch(r"what color is the (\w+)", question):
        return list(COLOURS)[thing_of(match[1]).colour]
    match = re.fullmatch(r"how many objects are (\w+)", question)
    assert match, question
    colours = [list(COLOURS)[thing.colour] for thing in scene.things()]
    return ("none", "one", "two", "three")[colours.count(match[1])]
