"""Question answering from a checkpoint: the likeliest answer of its list to each question, and how many are right.

Legend: Q questions, R questions at once, K clips, A answers.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor

from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate.aggregate import Aggregation, aggregate
from alpro_stream.evaluate.answers import AnswerAccuracy, accuracy_by_type
from alpro_stream.evaluate.embed import StoredClip, embed_videos
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, encoding
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.evaluate.result import ANSWERS_FILE, Result, ResultPart, Split, digest_of
from alpro_stream.evaluate.runner import Outcome, run_task
from alpro_stream.losses.answers import answer_numbers
from alpro_stream.model.alpro import AlproModel
from alpro_stream.stream.units import same_text
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained

QUESTION_TYPES = ("what", "who", "how", "where", "when", "other")
"""Those of MSRVTT-QA and MSVD-QA (Xu et al., ACM MM 2017), and all others."""


class AnswerEvaluateConfig(EvaluationConfig):
    """Question answering over the questions of some data sets; docs/finetuning.md."""

    task: Literal["question_answering"]
    """What is evaluated; see the other modules of `alpro_stream.evaluate`."""
    keep_answers: bool = True
    """Write answers.jsonl: every question with its answer and the model's."""


class Asked(NamedTuple):
    """A question of a clip, with its right answer."""

    key: str
    question: str
    answer: str


class AnswerMetrics(ResultPart):
    """Shares of right answers, in percent."""

    accuracy: float
    by_type: dict[str, float | None]


class AnswerChance(ResultPart):
    """What one answer to all questions reaches, and the most frequent right answer to those of each type."""

    accuracy: float
    answer: str
    by_type: dict[str, float | None]


class AnswerSplit(Split):
    """What was asked, and to how much of it the model has no answer."""

    num_questions: int
    num_by_type: dict[str, int]
    num_unlisted_answers: int


class AnswerResult(Result):
    """What `result.json` of this task holds."""

    metrics: AnswerMetrics  # type: ignore[assignment]
    chance: AnswerChance
    split: AnswerSplit


def evaluate_answers(config: AnswerEvaluateConfig, world: World | None = None) -> dict[str, Any]:
    """Answers, counts and writes `result.json` and `answers.jsonl`; see `run_task`."""
    return run_task(_answer, config, world)


def _answer(config: AnswerEvaluateConfig, data: Opened, world: World) -> Outcome:
    """Each rank answers the questions of its part of the videos."""
    trained, answers = data.trained, data.trained.description.answers
    clips = [clip for clip in data.clips if clip.questions]
    asked = [Asked(clip.key, *pair) for clip in clips for pair in zip(clip.questions, clip.answers, strict=True)]
    truth_Q = true_answers(asked, answers)
    with world.all_or_none():
        model = _check(trained, data, truth_Q, asked)
    world.stage.enter("the questions")
    ends = list(accumulate(len(clip.questions) for clip in clips))
    # Every rank fills in its own, and the sum is the whole.
    predicted_Q = torch.zeros(len(asked), dtype=torch.int64, device=world.device)
    with world.all_or_none("the answers of all ranks"), encoding(config, trained, world) as how:
        own = range(world.rank, len(clips), world.size)
        rows = [row for number in own for row in range(ends[number] - len(clips[number].questions), ends[number])]
        if rows:
            predicted_Q[rows] = answer_questions(model, [clips[n] for n in own], answers, how, config.aggregation)
    predicted_Q = world.sum(predicted_Q).cpu()
    type_Q = torch.tensor([QUESTION_TYPES.index(question_type(one.question)) for one in asked])
    accuracy = accuracy_by_type(predicted_Q, truth_Q, type_Q, QUESTION_TYPES)
    num_unlisted = int((truth_Q < 0).sum())
    unlisted = f"of {len(asked)} questions: {num_unlisted} whose answer the model does not have; they count as wrong"
    write = partial(_write_answers, asked=asked, given=[answers[n] for n in predicted_Q.tolist()], truth_Q=truth_Q)
    return Outcome(
        metrics=_in_percent(accuracy),
        chance={
            "accuracy": 100 * float((truth_Q == 0).double().mean()),
            "answer": answers[0],
            "by_type": {name: _most_frequent(asked, name) for name in QUESTION_TYPES},
        },
        protocol={
            "answers": f"the likeliest of {sum(map(bool, answers))}",
            "right": "the same text; capitals make no difference",
            "unlisted_answers": "are never right",
            "question_types": f"by the first word: {', '.join(QUESTION_TYPES)}",
        },
        split={
            "digest": digest_of(sorted(asked)),
            "num_videos": len({one.key for one in asked}),
            "num_videos_without_questions": len(data.clips) - len(clips),
            "num_questions": len(asked),
            "num_by_type": accuracy.num_by_type,
            "num_unlisted_answers": num_unlisted,
        },
        files={ANSWERS_FILE: write} if config.keep_answers else {},
        warnings=[unlisted] if num_unlisted else [],
    )


def question_type(question: str) -> str:
    """By its first word, as the data sets' authors do; ``other`` where that is none of `QUESTION_TYPES`."""
    first = next(iter(same_text(question).split()), "").strip("?,'\"")
    return first if first in QUESTION_TYPES else "other"


def _most_frequent(asked: Sequence[Asked], name: str) -> float | None:
    """Percentage of the questions of a type that have the most frequent answer of it; None where there are none."""
    counts = Counter(same_text(one.answer) for one in asked if question_type(one.question) == name)
    return 100 * max(counts.values()) / counts.total() if counts else None


def true_answers(asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
    """Number of each right answer in a list, (Q,); -1 where the list does not have it."""
    numbers = answer_numbers(answers)
    return torch.tensor([numbers.get(same_text(one.answer), -1) for one in asked], dtype=torch.int64)


@torch.inference_mode()
def answer_questions(
    model: AlproModel,
    clips: Sequence[StoredClip],
    answers: Sequence[str],
    how: Encoding,
    aggregation: Aggregation = "mean",
) -> Tensor:
    """Number of the likeliest answer to each question of some clips, in their order.

    Each video is encoded once, however many questions there are about it.

    Args:
        model: with an answer head.
        clips: with questions.
        answers: of the head's outputs; one without a text is never given.
        how: clips and questions are encoded.
        aggregation: of the logits of the clips that a video is cut into, before the softmax as in ClipBERT.

    Raises:
        SampleError: a video cannot be read or decoded.
    """
    device = next(model.parameters()).device
    is_named_A = torch.tensor([bool(answer) for answer in answers], device=device)
    predicted = []
    for part in in_parts(clips, how.batch_size // how.num_clips, "videos with questions"):
        videos = embed_videos(model.dual, part, how.choice, how.decoder, how.batch_size, how.num_clips)
        pairs = [(row, question) for row, clip in enumerate(part) for question in clip.questions]
        for some in in_parts(pairs, how.batch_size // how.num_clips, "questions of these videos"):
            ids, mask = how.tokenizer([question for _, question in some], how.num_tokens)
            mask_BL = mask.to(device)
            text_BLD, _ = model.dual.encode_text(ids.to(device), mask_BL)
            video_R = torch.tensor([row for row, _ in some], device=device)
            clip_RK = video_R[:, None] * how.num_clips + torch.arange(how.num_clips, device=device)
            cls_B1D = model.multimodal(
                text_BLD.repeat_interleave(how.num_clips, dim=0),
                mask_BL.repeat_interleave(how.num_clips, dim=0),
                videos.tokens_VND[clip_RK.flatten()],
                num_tokens=1,
            )
            logits_RKA = model.answer_logits(cls_B1D[:, 0]).float().view(len(some), how.num_clips, -1)
            logits_RA = aggregate(logits_RKA.transpose(1, 2), aggregation)
            predicted.append(logits_RA.masked_fill(~is_named_A, -torch.inf).argmax(dim=1))
    return torch.cat(predicted)


def _check(trained: Trained, data: Opened, truth_Q: Tensor, asked: Sequence[Asked]) -> AlproModel:
    """Refuses in the first seconds what would say nothing after hours; returns the model that answers."""
    model, task = trained.model, trained.description.task
    if task != "question_answering" or not isinstance(model, AlproModel):
        raise ConfigError(
            f"{trained.path} was trained for {task}: it has no answers to choose from. Set checkpoint to a run of task "
            "question_answering, or task=retrieval"
        )
    if not asked:
        raise DataError(
            f"{len(data.clips)} videos and images, and no question: shard the split with its questions and answers, or "
            "name other sources"
        )
    if (truth_Q < 0).all():
        num_answers, common = len(trained.description.answers), Counter(one.answer for one in asked).most_common(1)
        raise DataError(
            f"none of the {len(asked)} questions has one of the {num_answers} answers of {trained.path}: the most "
            f"frequent one is {common[0][0]!r}, the model's first {trained.description.answers[0]!r}. Was it trained "
            "on another data set?"
        )
    return model


def _in_percent(accuracy: AnswerAccuracy) -> dict[str, Any]:
    by_type = {name: None if share is None else 100 * share for name, share in accuracy.by_type.items()}
    return {"accuracy": 100 * accuracy.overall, "by_type": by_type}


def _write_answers(file: BinaryIO, asked: Sequence[Asked], given: Sequence[str], truth_Q: Tensor) -> None:
    for one, answer, is_listed in zip(asked, given, (truth_Q >= 0).tolist(), strict=True):
        line = {**one._asdict(), "given": answer, "listed": is_listed}
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
