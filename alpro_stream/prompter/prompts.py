"""The prompts: an entity in twelve sentences for videos and twelve for images (published code)."""

from collections.abc import Sequence
from typing import Literal

Prompting = Literal["ensemble", "single"]
"""An entity in all twelve sentences of a kind, whose features are averaged, as published; or in one of them, which the
paper compares with that."""

PROMPT_TOKENS = 15
"""Published length of a prompt in tokens."""

_ARTICLES = ("a", "the", "one")
_OPENINGS = {
    "video": ("A footage of", "A video of", "A portrait of", "A video footage of"),
    "image": ("A photo of", "A picture of", "A good photo of", "A good picture of"),
}
_SINGLE = {"video": "A video of a {}.", "image": "A photo of a {}."}


def templates(kind: Literal["video", "image"], prompting: Prompting = "ensemble") -> tuple[str, ...]:
    """The templates of a kind; ``{}`` is the place of the entity."""
    if prompting == "single":
        return (_SINGLE[kind],)
    return tuple(f"{opening} {article} {{}}." for opening in _OPENINGS[kind] for article in _ARTICLES)


def prompts(entities: Sequence[str], kind: Literal["video", "image"], prompting: Prompting = "ensemble") -> list[str]:
    """All prompts of a kind, template by template."""
    return [template.format(entity) for template in templates(kind, prompting) for entity in entities]
