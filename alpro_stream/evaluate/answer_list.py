"""The answers that a question answering model chooses from: the most frequent ones of its training questions."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError, DataError, SampleError
from alpro_stream.evaluate.words import load_words
from alpro_stream.stream.sources import Listing, Source
from alpro_stream.stream.units import same_text

logger = logging.getLogger(__name__)


class AnswersConfig(Config):
    """Which answers a model can give."""

    num: int = Field(default=1500, ge=2)
    """Most frequent answers of the training questions; 1500 as published for MSRVTT-QA."""
    file: Path | None = None
    """A list in place of these: text with one a line, a JSON list, or the authors' JSON object of answer to number."""


def check_questions(listings: Sequence[Listing], places: Sequence[str]) -> None:
    """Refuses data sets without a question.

    Raises:
        DataError: there is none in any of them.
    """
    if not any(shard.num_questions for listing in listings for shard in listing.info.shards):
        raise DataError(
            f"no question in {', '.join(places)}: question answering needs rows with a question and its answer. Shard "
            "the corpus with them (docs/manifests.md), or train another task"
        )


def answer_list(config: AnswersConfig, sources: Sequence[Source]) -> list[str]:
    """The answer list of a run, and a word on how much of its training questions it covers.

    Args:
        config: how many, or from where.
        sources: of the run; their metadata are read whole.

    Raises:
        ConfigError: a file that is no list of answers, or has none of the answers of the training questions.
        ShardError: a shard that cannot be read.
    """
    counts = count_answers(sources)
    answers = load_words(config.file) if config.file else most_frequent(counts, config.num)
    num_questions = counts.total()
    num_covered = sum(counts[same_text(answer)] for answer in answers)
    if not num_covered:
        raise ConfigError(
            f"none of the {num_questions} training questions has an answer of {config.file} (their most frequent one "
            f"is {most_frequent(counts, 1)[0]!r}); set answers.file=null to take the list from the questions"
        )
    if len(answers) < 2:
        raise ConfigError(f"{config.file or 'the training questions'} has 1 answer, {answers[0]!r}: nothing to choose")
    if config.file is None and len(answers) < config.num:
        logger.warning("answers.num=%d: the training questions have %d, all are taken", config.num, len(answers))
    logger.info(
        "answer list: %d of the %d answers of the training questions, right for %d of %d questions (%.1f %%); the "
        "others are left out of the loss",
        len(answers), len(counts), num_covered, num_questions, 100 * num_covered / num_questions,
    )  # fmt: skip
    return answers


def most_frequent(counts: Counter[str], num: int) -> list[str]:
    """The `num` most frequent answers, most frequent first, equally frequent ones by the alphabet."""
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:num]


def count_answers(sources: Sequence[Source]) -> Counter[str]:
    """How many questions have which answer; samples that are excluded or damaged have none."""
    counts: Counter[str] = Counter()
    for source in sources:
        for shard in source.shards:
            excluded = source.listing.excluded.get(shard.name, ())
            for slot in range(shard.num_samples):
                if slot in excluded:
                    continue
                try:
                    metadata = source.reader.metadata(shard.name, slot)
                except SampleError:
                    continue
                counts.update(same_text(pair.answer) for pair in metadata.qa)
    return counts
