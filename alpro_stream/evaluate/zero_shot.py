"""Zero-shot recognition by prompts: the class whose sentences are most similar to a video, as CLIP does it.

Radford et al., ICML 2021, section 3.1: a class is the mean of its features over templates; here the twelve templates
of the prompter (`alpro_stream.prompter.prompts`). Legend: V videos, K clips of one, C classes, E projection.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate.aggregate import Aggregation, aggregate
from alpro_stream.evaluate.embed import StoredClip, embed_videos
from alpro_stream.evaluate.features import Encoding, of_all_ranks, own_share
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, encoding
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.evaluate.queries import captions_of
from alpro_stream.evaluate.result import Result, Split, digest_of
from alpro_stream.evaluate.runner import Outcome, run_task
from alpro_stream.evaluate.words import load_words
from alpro_stream.prompter.bank import build_bank
from alpro_stream.prompter.prompts import PROMPT_TOKENS, templates
from alpro_stream.stream.units import same_text
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained

_TOP = (1, 5)


class RecognitionConfig(EvaluationConfig):
    """Recognition over videos whose first caption is the name of their class; docs/finetuning.md."""

    task: Literal["recognition"]
    """What is evaluated; see the other modules of `alpro_stream.evaluate`."""
    classes: Path | None = None
    """Names of all classes: text with one a line, a JSON list, or a JSON object of name to number. Null takes those
    that the data sets have."""


class RecognitionSplit(Split):
    """What was shown, and of how many classes."""

    num_classes: int
    num_unlisted_classes: int


class RecognitionResult(Result):
    """What `result.json` of this task holds."""

    metrics: dict[str, float] = Field(min_length=1)
    chance: dict[str, float]
    split: RecognitionSplit


def recognise(config: RecognitionConfig, world: World | None = None) -> dict[str, Any]:
    """Recognises, counts and writes `result.json`; see `run_task`."""
    return run_task(_recognise, config, world)


def _recognise(config: RecognitionConfig, data: Opened, world: World) -> Outcome:
    """Each rank looks at its part of the videos."""
    trained, clips = data.trained, [clip for clip in data.clips if captions_of(clip)]
    with world.all_or_none():
        classes = _classes(config.classes, clips)
        truth_V = true_classes(clips, classes)
        _check(config, data, truth_V, classes)
    world.stage.enter("the videos")
    with world.all_or_none("the videos of all ranks"), encoding(config, trained, world) as how:
        own_scores_VC = class_scores(trained, own_share(clips, world), classes, how, config.aggregation)
    scores_VC = of_all_ranks(own_scores_VC, len(clips), world).cpu()
    num_unlisted = int((truth_V < 0).sum())
    unlisted = f"of {len(clips)} videos: {num_unlisted} whose class is not in the list; they count as wrong"
    return Outcome(
        metrics={f"top_{k}": share_in_top(scores_VC, truth_V, k) for k in _TOP},
        chance={f"top_{k}": 100 * min(1.0, k / len(classes)) for k in _TOP},
        protocol={
            "num_tokens": PROMPT_TOKENS,
            "classes": len(classes),
            "prompts": {kind: list(templates(kind)) for kind in sorted({clip.source.kind for clip in clips})},
            "ties": "count against the right class",
        },
        split={
            "digest": digest_of([sorted([clip.key, class_of(clip)] for clip in clips), list(classes)]),
            "num_videos": len(clips),
            "num_videos_without_class": len(data.clips) - len(clips),
            "num_classes": len(classes),
            "num_unlisted_classes": num_unlisted,
        },
        warnings=[unlisted] if num_unlisted else [],
    )


@torch.inference_mode()
def class_scores(
    trained: Trained,
    clips: Sequence[StoredClip],
    classes: Sequence[str],
    how: Encoding,
    aggregation: Aggregation = "mean",
) -> Tensor:
    """Similarity of each video with each class over the temperature, (V, C).

    Args:
        trained: the model.
        clips: the videos.
        classes: their names.
        how: clips are encoded.
        aggregation: of the similarities of the clips that a video is cut into.

    Raises:
        SampleError: a video cannot be read or decoded.
    """
    dual = trained.dual
    kinds = {clip.source.kind for clip in clips}
    class_CE = {kind: build_bank(dual, trained.tokenizer, classes, kind) for kind in kinds}
    rows = []
    for part in in_parts(clips, how.batch_size // how.num_clips, "videos"):  # so that the tokens of few are held
        feature_KE = embed_videos(dual, part, how.choice, how.decoder, how.batch_size, how.num_clips).feature_VE
        for clip, clip_KE in zip(part, torch.split(feature_KE, how.num_clips), strict=True):
            logits_KC = clip_KE @ class_CE[clip.source.kind].T / dual.temperature()
            rows.append(aggregate(logits_KC.T, aggregation))
    return torch.stack(rows)


def share_in_top(scores_VC: Tensor, truth_V: Tensor, k: int) -> float:
    """Percentage of videos whose class is among the k best; ties count against it, and so does a class of -1."""
    right_V1 = scores_VC.gather(1, truth_V.clamp(min=0)[:, None])
    rank_V = (scores_VC >= right_V1).sum(dim=1)
    return 100 * float(((rank_V <= k) & (truth_V >= 0)).double().mean())


def true_classes(clips: Sequence[StoredClip], classes: Sequence[str]) -> Tensor:
    """Number of the class of each video, (V,); -1 where the list does not have it."""
    numbers = {same_text(name): number for number, name in enumerate(classes)}
    return torch.tensor([numbers.get(same_text(class_of(clip)), -1) for clip in clips])


def class_of(clip: StoredClip) -> str:
    """Its first caption."""
    return captions_of(clip)[0]


def _classes(path: Path | None, clips: Sequence[StoredClip]) -> list[str]:
    return load_words(path) if path else sorted({same_text(class_of(clip)) for clip in clips})


def _check(config: RecognitionConfig, data: Opened, truth_V: Tensor, classes: Sequence[str]) -> None:
    """Refuses in the first seconds what would say nothing."""
    if data.trained.description.task == "question_answering":
        raise ConfigError(
            f"{data.trained.path} was trained to answer questions: its features are not trained. Set checkpoint to one "
            "of task prompter, pretrain or retrieval"
        )
    if not len(truth_V):
        raise DataError(
            f"{len(data.clips)} videos and images, and no caption (questions are none): the class of a video is its "
            "first caption. Shard the split with them, or name other sources"
        )
    if len(classes) < 2:
        raise ConfigError(f"{config.classes or 'the data set'} has {len(classes)} class: nothing to choose from")
    if (truth_V < 0).all():
        raise DataError(
            f"none of the {len(truth_V)} videos is of a class of {config.classes}: the class of a video is its first "
            "caption. Correct the list, or set classes=null"
        )
