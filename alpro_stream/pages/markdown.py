"""Texts from data inside Markdown, and the front matter by which Hugging Face finds a data set."""

import html
import re
from typing import Any

import yaml
from markupsafe import Markup

from alpro_stream.pages.numbers import shorten
from alpro_stream.pages.shard_report import DatasetCard

# All that can begin a construct of Markdown inside a line; values never begin a line.
_SPECIAL = re.compile(r"[\\`*_\[\]|~$#]")
_LONGEST = 300
_TEN_TIMES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
# Those identifiers of Hugging Face that a corpus of clips is likely to state.
_KNOWN_LICENSE = re.compile(
    r"apache-2\.0|mit|cc0-1\.0|odc-by|odbl|pddl"
    r"|cc-by-[234]\.0|cc-by-sa-[34]\.0|cc-by-nc-[234]\.0|cc-by-nd-4\.0|cc-by-nc-nd-[34]\.0|cc-by-nc-sa-[234]\.0"
)


def escape_markdown(value: object) -> Markup:
    """A value as one line of plain text in Markdown, in a table too; a very long one is shortened.

    What this function returns is not escaped again.
    """
    if isinstance(value, Markup):
        return value
    return Markup(_SPECIAL.sub(r"\\\g<0>", html.escape(_one_line(str(value)), quote=False)))


def front_matter(card: DatasetCard) -> Markup:
    """The YAML at the head of a dataset card, without the lines around it."""
    num_questions = sum(split.num_questions for split in card.splits)
    values: dict[str, Any] = {"pretty_name": _one_line(card.title)}
    values |= _license(card.licenses)
    values["task_categories"] = ["video-text-to-text", *["visual-question-answering"] * (num_questions > 0)]
    values["size_categories"] = [size_category(sum(split.num_samples for split in card.splits))]
    return Markup(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6).strip())


def size_category(num_samples: int) -> str:
    """Hugging Face's name for a number of samples, such as ``1K<n<10K``."""
    if num_samples < 1000:
        return "n<1K"
    power = (len(str(num_samples)) - 1) - 3
    if power + 1 >= len(_TEN_TIMES):
        return "n>1T"
    return f"{_TEN_TIMES[power]}<n<{_TEN_TIMES[power + 1]}"


def _license(licenses: tuple[tuple[str, int], ...]) -> dict[str, str]:
    """The licence, where all samples state one and the same."""
    if len(licenses) != 1 or not licenses[0][0].strip():
        return {}
    identifier = re.sub(r"[^a-z0-9.]+", "-", licenses[0][0].lower()).strip("-")
    if _KNOWN_LICENSE.fullmatch(identifier):
        return {"license": identifier}
    return {"license": "other", **({"license_name": identifier[:60]} if identifier else {})}


def _one_line(text: str) -> str:
    return shorten("".join(character if character.isprintable() else " " for character in text), _LONGEST)
