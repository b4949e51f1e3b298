"""What is said of a clip: captions, questions with answers, and captions that are almost true."""

from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Literal

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.testing.glyphs.scene import Mover, Scene, Still, Thing
from alpro_stream.testing.glyphs.vocabulary import ANIMALS, COLOURS, NOUNS, STEPS

# Those of the prompts among them (`alpro_stream.prompter.prompts`): a prompter is asked in words that it has read.
_OPENINGS = ("a video of ", "a footage of ", "a portrait of ", "a video footage of ", "we see ", "there is ", "")
_ARTICLES = ("a", "the", "one")
_ENDINGS = ("", ".")
_COLOUR_NAMES = tuple(COLOURS)
_NUMBERS = ("none", "one", "two", "three")

Probability = float
FoilGroup = Literal["direction", "binding", "order"]


class CaptionConfig(Config):
    """How much training captions say; those of held-out clips say everything."""

    short: Probability = Field(default=0.2, ge=0, le=1)
    """Share of captions that name one object and nothing else."""
    short_colour: Probability = Field(default=0.5, ge=0, le=1)
    """Of short ones, those that say its colour."""
    colour: Probability = Field(default=0.9, ge=0, le=1)
    """That another caption says the colour of an object."""
    both_movers: Probability = Field(default=0.7, ge=0, le=1)
    """That both movers are named, where there are two."""
    corner: Probability = Field(default=0.6, ge=0, le=1)
    """That the object in the corner is named; always where nothing moves."""


class Foil(Config):
    """Captions of one clip of which one is true, and what tells them apart."""

    group: FoilGroup
    captions: tuple[str, ...]
    answer: int


def draw_caption(random: Random, scene: Scene, config: CaptionConfig) -> str:
    """A true caption that says as much as `config` wants."""
    if random.random() < config.short:
        thing = random.choice(scene.things())
        named = _name(thing, random.random() < config.short_colour, random.choice(_ARTICLES))
        return random.choice(_OPENINGS) + named + random.choice(_ENDINGS)
    movers = list(scene.movers)
    if len(movers) == 2 and random.random() >= config.both_movers:
        movers = [random.choice(movers)]
    corner = scene.still if not movers or random.random() < config.corner else None

    def name(thing: Thing) -> str:
        return _name(thing, random.random() < config.colour)

    return _sentence([f"{name(mover.thing)} goes {mover.direction}" for mover in movers], _in_corner(corner, name))


def complete_caption(scene: Scene) -> str:
    """All that captions can say of a clip."""
    return _sentence([_movement(mover) for mover in scene.movers], _in_corner(scene.still, _full_name))


def questions(scene: Scene, num_colours: int = len(COLOURS)) -> list[tuple[str, str]]:
    """All questions that have one answer, with it; the first word is the type.

    Args:
        scene: of the clip.
        num_colours: of the corpus.
    """
    return list(_questions(scene, num_colours))


def single_facts(scene: Scene) -> list[tuple[str, str]]:
    """Sentences that are true of one object alone, each with its noun: a cloze, when the noun is hidden."""
    found, ways = list[tuple[str, str]](), [mover.direction for mover in scene.movers]
    for mover in scene.movers:
        if ways.count(mover.direction) == 1:
            noun = NOUNS[mover.thing.noun]
            found.append((f"a {noun} goes {mover.direction}", noun))
    if scene.still:
        noun = NOUNS[scene.still.thing.noun]
        found.append((f"a {noun} in the {scene.still.corner} corner", noun))
    return found


def foils(scene: Scene, is_seen: Callable[[Thing], bool] = lambda thing: True) -> list[Foil]:
    """The true caption among those in which one thing is wrong: a direction, who has which colour, who goes first.

    Args:
        scene: of the clip.
        is_seen: whether training clips show an object; colours are swapped where both captions have as many that none
            shows. Else the caption of objects that were read of before would be the wrong one as a rule.
    """
    found, true = list[Foil](), complete_caption(scene)
    if scene.movers:
        first = scene.movers[0]
        others = [_with_first(scene, first.model_copy(update={"direction": way})) for way in STEPS]
        captions = [complete_caption(other) for other in others]
        found.append(Foil(group="direction", captions=tuple(captions), answer=captions.index(true)))
    if len(scene.movers) == 2:
        first, second = scene.movers
        if first.thing.colour != second.thing.colour:
            swapped = _with_movers(scene, _coloured(first, second), _coloured(second, first))
            if sum(map(is_seen, swapped.things())) == sum(map(is_seen, scene.things())):
                found.append(Foil(group="binding", captions=(true, complete_caption(swapped)), answer=0))
        found.append(
            Foil(group="order", captions=(true, complete_caption(_with_movers(scene, second, first))), answer=0)
        )
    return found


def _questions(scene: Scene, num_colours: int) -> Iterator[tuple[str, str]]:
    if still := scene.still:
        noun = NOUNS[still.thing.noun]
        yield f"{_asks_for(still.thing)} is in the {still.corner} corner", noun
        yield f"where is the {noun}", still.corner
    ways = [mover.direction for mover in scene.movers]
    for number, mover in enumerate(scene.movers):
        noun = NOUNS[mover.thing.noun]
        if ways.count(mover.direction) == 1:
            yield f"{_asks_for(mover.thing)} goes {mover.direction}", noun
        yield f"where does the {noun} go", mover.direction
        if len(scene.movers) == 2:
            yield f"when does the {noun} go", ("first", "last")[number]
    for thing in scene.things():
        yield f"what color is the {NOUNS[thing.noun]}", _COLOUR_NAMES[thing.colour]
    # Held-out clips all show three objects: how many there are would be no question.
    seen = Counter(_COLOUR_NAMES[thing.colour] for thing in scene.things())
    absent = [name for name in _COLOUR_NAMES[:num_colours] if name not in seen]
    # Any of them, so that no colour alone gives the answer away.
    asked = [absent[scene.things()[0].noun % len(absent)]] if absent else []
    for colour in (*seen, *asked):
        yield f"how many objects are {colour}", _NUMBERS[seen[colour]]


def _asks_for(thing: Thing) -> str:
    return "who" if NOUNS[thing.noun] in ANIMALS else "what"


def _name(thing: Thing, with_colour: bool, article: str = "a") -> str:
    words = [article, _COLOUR_NAMES[thing.colour], NOUNS[thing.noun]]
    return " ".join(words if with_colour else [article, NOUNS[thing.noun]])


def _full_name(thing: Thing) -> str:
    return _name(thing, with_colour=True)


def _movement(mover: Mover) -> str:
    return f"{_full_name(mover.thing)} goes {mover.direction}"


def _in_corner(still: Still | None, name: Callable[[Thing], str]) -> str | None:
    return f"{name(still.thing)} in the {still.corner} corner" if still else None


def _sentence(movements: list[str], corner: str | None) -> str:
    moving = " then ".join(movements)
    return " with ".join(part for part in (moving, corner) if part)


def _with_movers(scene: Scene, *movers: Mover) -> Scene:
    return scene.model_copy(update={"movers": movers})


def _with_first(scene: Scene, mover: Mover) -> Scene:
    return _with_movers(scene, mover, *scene.movers[1:])


def _coloured(mover: Mover, like: Mover) -> Mover:
    thing = mover.thing.model_copy(update={"colour": like.thing.colour})
    return mover.model_copy(update={"thing": thing})
