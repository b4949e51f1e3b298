"""Multiple choice: which of some captions a video has, as in MSRVTT-MC, and foils in which one thing is wrong.

Legend: Q questions, C captions, U texts that differ among them, V videos, K clips, E projection.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alpro_stream.evaluate.aggregate import aggregate
from alpro_stream.evaluate.embed import StoredClip, embed_texts, embed_videos
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.lines import ClipLine, by_clip, read_lines
from alpro_stream.evaluate.matching import match_odds
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, encoding
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.evaluate.queries import different_texts
from alpro_stream.evaluate.result import Result, Split, digest_of
from alpro_stream.evaluate.runner import Outcome, run_task
from alpro_stream.evaluate.scoring import Score, check_can_score
from alpro_stream.model.alpro import AlproModel
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained


class ChoiceConfig(EvaluationConfig):
    """Multiple choice over the videos of some data sets; docs/evaluation.md."""

    task: Literal["multiple_choice"]
    """What is evaluated; see the other modules of `alpro_stream.evaluate`."""
    choices: Path
    """JSON lines: `id` of a clip, `captions`, `answer` (the number of the true one, from 0), and perhaps `group`."""
    scores: tuple[Score, ...] = Field(default=("vtc", "vtm"), min_length=1)
    """By what the captions are ranked: feature similarity, the matching head."""


class Choice(ClipLine):
    """A question."""

    captions: tuple[str, ...] = Field(min_length=2)
    """Of which one is true of the clip."""
    answer: int = Field(ge=0)
    """Its number."""
    group: str = "all"
    """Questions of a group are also counted by themselves."""

    @model_validator(mode="after")
    def _has_an_answer(self) -> Self:
        if self.answer >= len(self.captions):
            raise ValueError(f"answer {self.answer} is none of the {len(self.captions)} captions, counted from 0")
        if self.captions.count(self.captions[self.answer]) > 1:
            raise ValueError(f"the true caption is there twice: {self.captions[self.answer]!r}")
        return self


class ChoiceResult(Result):
    """What `result.json` of this task holds."""

    chance: dict[str, float]
    split: Split


def choose(config: ChoiceConfig, world: World | None = None) -> dict[str, Any]:
    """Chooses, counts and writes `result.json`; see `run_task`."""
    return run_task(_choose, config, world)


def _choose(config: ChoiceConfig, data: Opened, world: World) -> Outcome:
    """Each rank looks at its part of the videos."""
    trained = data.trained
    with world.all_or_none():
        questions, num_elsewhere = read_lines(config.choices, Choice, {clip.key for clip in data.clips})
        check_can_score(trained, config.scores)
    numbers = by_clip([one.id for one in questions])
    clips = [clip for clip in data.clips if clip.key in numbers]
    world.stage.enter("the questions")
    # Every rank fills in its own, and the sum is the whole.
    is_right_QS = torch.zeros(len(questions), len(config.scores), dtype=torch.int64)
    with world.all_or_none("the questions of all ranks"), encoding(config, trained, world) as how:
        for part in in_parts(clips[world.rank :: world.size], how.batch_size // how.num_clips, "videos"):
            rows = [number for clip in part for number in numbers[clip.key]]
            is_right_QS[rows] = _right(config, trained, part, [questions[row] for row in rows], how).long()
    is_right_QS = world.sum(is_right_QS.to(world.device)).cpu()
    groups = sorted({one.group for one in questions})
    return Outcome(
        metrics={
            **{score: _share(is_right_QS[:, number]) for number, score in enumerate(config.scores)},
            "by_type": {
                f"{group}_{score}": _share(is_right_QS[[one.group == group for one in questions], number])
                for group in groups
                for number, score in enumerate(config.scores)
            },
        },
        chance={"all": _chance(questions)}
        | {group: _chance([one for one in questions if one.group == group]) for group in groups},
        protocol={"right": "the true caption has the highest score", "ties": "count against the right answer"},
        split={
            "digest": digest_of(sorted([one.id, one.captions, one.answer, one.group] for one in questions)),
            "num_videos": len(clips),
            "num_questions": len(questions),
            "num_by_group": {group: sum(one.group == group for one in questions) for group in groups},
            "num_elsewhere": num_elsewhere,
        },
    )


@torch.inference_mode()
def _right(
    config: ChoiceConfig, trained: Trained, clips: Sequence[StoredClip], questions: Sequence[Choice], how: Encoding
) -> Tensor:
    """Whether each question about some clips is answered rightly, (Q, scores)."""
    dual, video_of = trained.dual, {clip.key: number for number, clip in enumerate(clips)}
    videos = embed_videos(dual, clips, how.choice, how.decoder, how.batch_size, how.num_clips)
    captions = [caption for one in questions for caption in one.captions]
    different = different_texts(captions, how.tokenizer, how.num_tokens)
    texts = embed_texts(dual, different.texts, how.tokenizer, how.batch_size, how.num_tokens)
    video_C = torch.tensor([video_of[one.id] for one in questions for _ in one.captions])
    pair_C = (different.text_C, video_C)
    by_score = list[Tensor]()
    for score in config.scores:
        if score == "vtc":
            feature_VKE = videos.feature_VE.view(len(clips), how.num_clips, -1)
            logits_UVK = torch.einsum("ue,vke->uvk", texts.feature_CE, feature_VKE) / dual.temperature()
            scores_UV = aggregate(logits_UVK, config.aggregation)
        else:
            assert isinstance(trained.model, AlproModel)
            wanted_UV = torch.zeros(len(different.texts), len(clips), dtype=torch.bool)
            wanted_UV[pair_C] = True
            scores_UV = match_odds(
                trained.model, texts, videos, wanted_UV, how.batch_size, how.num_clips, config.aggregation
            )
        score_C = scores_UV.cpu()[pair_C]
        by_question = torch.split(score_C, [len(one.captions) for one in questions])
        right = [_is_best(scores, one.answer) for scores, one in zip(by_question, questions, strict=True)]
        by_score.append(torch.tensor(right))
    return torch.stack(by_score, dim=1)


def _is_best(scores_C: Tensor, answer: int) -> bool:
    """A tie counts against it."""
    return int((scores_C >= scores_C[answer]).sum()) == 1


def _share(is_right_Q: Tensor) -> float:
    return 100 * float(is_right_Q.double().mean())


def _chance(questions: Sequence[Choice]) -> float:
    return 100 * sum(1 / len(one.captions) for one in questions) / len(questions)
