"""How often the prompter names what its crop shows, where it is known what is where.

Legend: V videos, T frames, M entities.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.embed import pixels_of
from alpro_stream.evaluate.lines import ClipLine, read_lines
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, encoding
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.evaluate.result import Result, Split, digest_of
from alpro_stream.evaluate.runner import Outcome, run_task
from alpro_stream.evaluate.words import load_words
from alpro_stream.losses.pem import PemConfig
from alpro_stream.prompter.bank import build_bank
from alpro_stream.prompter.labels import Labeller
from alpro_stream.prompter.prompts import Prompting
from alpro_stream.stream.crops import pem_crop_boxes
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.seeds import Draws, sample_keys
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained

Box = tuple[float, float, float, float]
_LEAST_SEEN = 0.5


class PrompterLabelsConfig(EvaluationConfig):
    """The prompter's soft labels for crops of some videos; docs/evaluation.md."""

    task: Literal["prompter_labels"]
    """What is evaluated; see the other modules of `alpro_stream.evaluate`."""
    objects: Path
    """JSON lines: `id` of a clip, and `objects`, each with its `word` and `boxes`: one for each stored frame, (top,
    left, height, width) as shares of its sides, null where the object is not seen."""
    entities: Path
    """What the prompter may say: entities.json of a shard set, or another list of words; see `load_words`."""
    prompts: Prompting = "ensemble"
    """Sentences of an entity, as in `prompter.prompts`."""
    crops_per_clip: int = Field(default=4, ge=1)
    """Crops of each video, drawn as in training."""


class LocatedObject(Config):
    """An object, and where it is in each stored frame."""

    word: str
    boxes: tuple[Box | None, ...] = Field(min_length=1)


class Located(ClipLine):
    """Objects of a clip."""

    objects: tuple[LocatedObject, ...]


class PrompterLabelsResult(Result):
    """What `result.json` of this task holds."""

    split: Split


def label(config: PrompterLabelsConfig, world: World | None = None) -> dict[str, Any]:
    """Labels, compares and writes `result.json`; see `run_task`."""
    return run_task(_label, config, world)


def _label(config: PrompterLabelsConfig, data: Opened, world: World) -> Outcome:
    """Each rank looks at its part of the videos."""
    trained, video = data.trained, data.trained.dual.config.video
    with world.all_or_none():
        _check(config, trained)
        entities = load_words(config.entities)
        lines, num_elsewhere = read_lines(config.objects, Located, {clip.key for clip in data.clips})
        located = {line.id: line for line in lines}
    clips = [clip for clip in data.clips if clip.key in located and clip.source.kind == "video"]
    number_of = {word: number for number, word in enumerate(entities)}
    banks = {"video": build_bank(trained.dual, trained.tokenizer, entities, "video", config.prompts)}
    labeller = Labeller(trained.dual, banks, PemConfig(), video.patch_size)
    world.stage.enter("the crops")
    # Sums over the crops: with an object, of these with the right top label, mass on objects, largest label; then
    # without one, largest label.
    sums = torch.zeros(6, dtype=torch.float64, device=world.device)
    with world.all_or_none("the crops of all ranks"), encoding(config, trained, world) as how:
        for part in in_parts(clips[world.rank :: world.size], how.batch_size, "videos"):
            pixels = pixels_of(part, how.choice, how.decoder)
            for crop in range(config.crops_per_clip):
                keys_B = sample_keys([("prompter labels", clip.key, crop) for clip in part], "pem box")
                boxes_B4 = pem_crop_boxes(video.image_size, video.patch_size, keys_B)
                soft = labeller(pixels.to(world.device), torch.from_numpy(boxes_B4).to(world.device), "video").labels_BM
                for q_M, box, clip in zip(soft, boxes_B4 / video.grid, part, strict=True):
                    words = seen_in(located[clip.key].objects, box, video.num_frames)
                    sums += _counted(q_M, [number_of[word] for word in words if word in number_of])
    with_object, right, mass, largest, without, largest_without = world.sum(sums).cpu().tolist()
    return Outcome(
        metrics={
            "top_entity": _percent(right, with_object),
            "mass_on_objects": _percent(mass, with_object),
            "confidence_with_object": _percent(largest, with_object),
            "confidence_without_object": _percent(largest_without, without),
        },
        chance={"top_entity": 100 / len(entities)},
        protocol={
            "prompts": config.prompts,
            "entities": len(entities),
            "crops_per_clip": config.crops_per_clip,
            "shown": f"at least {_LEAST_SEEN:.0%} of an object inside the crop, in one of the frames",
        },
        split={
            "digest": digest_of([sorted(located[clip.key].model_dump_json() for clip in clips), entities]),
            "num_videos": len(clips),
            "num_elsewhere": num_elsewhere,
            # Images, and videos of which nothing is known.
            "num_left_out": len(data.clips) - len(clips),
            "num_crops_with_object": int(with_object),
            "num_crops_without_object": int(without),
        },
    )


def _check(config: PrompterLabelsConfig, trained: Trained) -> None:
    """Refuses in the first seconds what would say nothing."""
    if trained.description.task == "question_answering":
        raise ConfigError(
            f"{trained.path} was trained to answer questions: its features are not trained. Give a prompter"
        )
    if config.num_clips > 1:
        raise ConfigError(f"num_clips={config.num_clips}: a prompter sees one clip, as in training; set num_clips=1")


def seen_in(objects: Sequence[LocatedObject], crop: NDArray[np.float64], num_frames: int) -> list[str]:
    """Words of the objects of which a crop shows enough, in one of the frames that a step takes for evaluation."""
    return [
        one.word
        for one in objects
        if any(
            box and _inside(box, crop) >= _LEAST_SEEN
            for index in choose_frames(len(one.boxes), num_frames, "uniform", Draws("unused"))
            for box in [one.boxes[index]]
        )
    ]


def _inside(box: Box, crop: NDArray[np.float64]) -> float:
    """Share of a box that lies inside a crop; both (top, left, height, width)."""
    top, left, height, width = box
    rows = min(top + height, crop[0] + crop[2]) - max(top, crop[0])
    columns = min(left + width, crop[1] + crop[3]) - max(left, crop[1])
    share: float = max(0.0, rows) * max(0.0, columns) / (height * width)
    return share


def _counted(q_M: Tensor, shown: Sequence[int]) -> Tensor:
    largest = float(q_M.max())
    if not shown:
        return q_M.new_tensor([0, 0, 0, 0, 1, largest], dtype=torch.float64)
    is_right = int(q_M.argmax()) in shown
    return q_M.new_tensor([1, is_right, float(q_M[list(shown)].sum()), largest, 0, 0], dtype=torch.float64)


def _percent(total: float, number: float) -> float | None:
    return 100 * total / number if number else None
