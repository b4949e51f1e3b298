"""Nouns of captions: tagged by TextBlob's pattern tagger and lemmatised by simplemma, both without any download."""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import simplemma
from textblob.en.taggers import PatternTagger

# Nouns that name the medium, a position, an amount or nothing in particular: no crop shows them.
_VAGUE = """
video videos footage clip clips film movie shot scene scenery view image images picture photo photograph photography
close closeup background foreground front back side top bottom middle center centre left right end edge part piece
corner line row pair group set couple lot bit kind type sort way thing something anything nothing everything someone
anyone everyone nobody everybody one ones other others thousand hundred dozen number amount time day moment second
minute hour today tomorrow yesterday place position direction use case fact name word example
"""
VAGUE_NOUNS = frozenset(_VAGUE.split())


def count_nouns(captions: Iterable[str]) -> Counter[str]:
    """Counts the lemmas of all nouns, vague ones left out: ``"Two dogs play on the grass"`` gives dog and grass."""
    counts: Counter[str] = Counter()
    for caption in captions:
        # Lower case first: the tagger takes a capitalised first word for a name.
        for word, tag in _tagger().tag(caption.lower()):
            if tag.startswith("NN") and _is_plain_word(word):
                lemma = _lemma(word)
                if lemma not in VAGUE_NOUNS:
                    counts[lemma] += 1
    return counts


def _is_plain_word(word: str) -> bool:
    letters = word.replace("-", "")
    return len(word) >= 3 and letters.isascii() and letters.isalpha() and word not in VAGUE_NOUNS


@cache
def _tagger() -> PatternTagger:
    return PatternTagger()


@cache
def _lemma(word: str) -> str:
    return str(simplemma.lemmatize(word, lang="en")).lower()
