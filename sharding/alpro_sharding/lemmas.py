"""Singulars of English nouns: simplemma's lemmas, which need no download, mended where they are those of a verb."""

import re
from functools import lru_cache

import simplemma

# Only these change in the plural without an "s"; of any other word simplemma would give a verb or an adjective
# ("saw" is not "see", "painting" is not "paint", "weed" is not "wee").
_PLURAL_WITHOUT_S = re.compile(r".*(men|children|mice|lice|geese|teeth|feet|oxen|ae)|cacti|fungi|octopi|alumni|radii")
# Things that come in pairs or not in ones, and words that only look like plurals.
_PAIRS = """
trousers shorts leggings tights overalls knickers panties breeches slacks sunglasses sun-glasses eyeglasses
spectacles binoculars tongs pliers scissors shears tweezers headphones earphones goods fries darts billiards
draughts innings commons summons ironworks sweepstakes measles mumps outskirts christmas us
"""
_KEPT = frozenset(_PAIRS.split())
_MENDED = {
    # The verb of the same form: to leave, to halve.
    "leaves": "leaf",
    "halves": "half",
    "calves": "calf",
    "shelves": "shelf",
    "bookshelves": "bookshelf",
    "loaves": "loaf",
    "thieves": "thief",
    "wives": "wife",
    "housewives": "housewife",
    "midwives": "midwife",
    "lives": "life",
    "skies": "sky",
    # A rare or French spelling.
    "asses": "ass",
    "crosses": "cross",
    "masses": "mass",
    "fixes": "fix",
    "mixes": "mix",
    "lenses": "lens",
    "fantasies": "fantasy",
    "nannies": "nanny",
    "maladies": "malady",
    "veggies": "veggie",
    # Unknown to simplemma, or taken for names.
    "poles": "pole",
    "mules": "mule",
    "grandmas": "grandma",
    "grandpas": "grandpa",
    "mechanics": "mechanic",
    "teahouses": "teahouse",
}


@lru_cache(maxsize=1 << 16)
def singular(noun: str) -> str:
    """The dictionary form of a noun in lower case: "buses" gives "bus"; "glass", "painting" and "scissors" stay."""
    if noun in _MENDED:
        return _MENDED[noun]
    if noun in _KEPT:
        return noun
    if noun.endswith("s") or _PLURAL_WITHOUT_S.fullmatch(noun):
        return str(simplemma.lemmatize(noun, lang="en")).lower()
    return noun
