"""Text-video retrieval from a checkpoint: features once per item, VTM once per pair, ranks both ways."""

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.embed import (
    StoredClip,
    TextEmbeddings,
    VideoEmbeddings,
    embed_texts,
    embed_videos,
    evenly_spread,
    stored_clips,
)
from alpro_stream.evaluate.ranking import (
    chance_text_to_video,
    retrieval_metrics,
    text_to_video_ranks,
    video_to_text_ranks,
)
from alpro_stream.media import FetchConfig, FrameConfig
from alpro_stream.model.alpro import AlproModel
from alpro_stream.shards.cache import CacheConfig
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig, closing_storage, open_sources
from alpro_stream.train.restore import Trained, load_trained

Score = Literal["vtc", "vtm"]


class EvaluateConfig(Config):
    """Retrieval over the clips and captions of some data sets."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file."""
    checkpoint: Path
    """Run or checkpoint."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets; all their clips are candidates, all their captions queries."""
    scores: tuple[Score, ...] = ("vtc", "vtm")
    """By what candidates are ranked: feature similarity, or the matching head as published."""
    batch_size: int = Field(default=32, ge=1)
    """Clips, captions or pairs that go through the model at once."""
    out: Path
    """Folder for result.json and scores.npz."""
    video: FrameConfig = FrameConfig()
    """Where whole videos are stored: the frames that are chosen from."""
    decode: DecodeConfig = DecodeConfig()
    """Bytes to pixels."""
    cache: CacheConfig = CacheConfig()
    """Where shards behind addresses are kept; unused when all are local."""
    fetch: FetchConfig = FetchConfig()
    """How they are fetched."""


@dataclass(frozen=True)
class Retrieval:
    """Everything a result is made of. C captions, V clips."""

    clips: list[StoredClip]
    captions: list[str]
    truth_C: Tensor
    scores_CV: dict[str, Tensor]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Scores, ranks and writes `result.json` and `scores.npz`; returns what result.json holds.

    Raises:
        AlproError: see `alpro_stream.errors`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with closing_storage(config.sources, config.cache, config.fetch) as storage:
        sources = open_sources(config.sources, storage=storage)
        trained = load_trained(config.checkpoint, device)
        retrieval = score_all(config, trained, stored_clips(sources))
    result = {
        "metrics": metrics_of(retrieval),
        "chance": asdict(chance_text_to_video(len(retrieval.clips))),
        "protocol": {
            "captions": "all captions of a clip are queries",
            "video_to_text": "rank of the clip's best caption",
            "frames": f"{trained.dual.config.video.num_frames}, spread evenly",
            "picture": f"whole frame resized to {trained.dual.config.video.image_size}",
            "ties": "count against the right answer",
        },
        "data": {source.name: source.reader.info.digest for source in sources},
        "checkpoint": {"path": str(trained.path), "weights_sha256": trained.weights_sha256},
        "config": config.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("alpro-stream", "torch")},
    }
    _write(config.out, result, retrieval)
    return result


def score_all(config: EvaluateConfig, trained: Trained, clips: list[StoredClip]) -> Retrieval:
    """Scores of every caption with every clip."""
    if "vtm" in config.scores and not isinstance(trained.model, AlproModel):
        raise ConfigError(f"{trained.path} is a prompter: it has no matching head; set scores=[vtc]")
    video = trained.dual.config.video
    device_id = torch.cuda.current_device() if torch.cuda.is_available() else None
    choice = evenly_spread(video.num_frames, config.video)
    max_frames = config.batch_size * video.num_frames
    captions = [caption for clip in clips for caption in clip.captions]
    truth_C = torch.tensor([index for index, clip in enumerate(clips) for _ in clip.captions])
    with closing(build_clip_decoder(config.decode, video.image_size, max_frames, device_id)) as decoder:
        videos = embed_videos(trained.dual, clips, choice, decoder, config.batch_size)
    texts = embed_texts(trained.dual, captions, trained.tokenizer, config.batch_size)
    scores: dict[str, Tensor] = {}
    if "vtc" in config.scores:
        scores["vtc"] = (texts.feature_CE @ videos.feature_VE.T).cpu()
    if "vtm" in config.scores and isinstance(trained.model, AlproModel):
        scores["vtm"] = matching_scores(trained.model, texts, videos, config.batch_size).cpu()
    return Retrieval(clips, captions, truth_C, scores)


@torch.inference_mode()
def matching_scores(model: AlproModel, texts: TextEmbeddings, videos: VideoEmbeddings, batch_size: int) -> Tensor:
    """Probability that caption and clip match, of every pair, (C, V): the published final score."""
    num_texts, num_videos = len(texts.text_CLD), len(videos.tokens_VND)
    scores = torch.empty(num_texts * num_videos, dtype=torch.float64, device=texts.text_CLD.device)
    for pairs in torch.split(torch.arange(len(scores), device=scores.device), batch_size):
        text, video = pairs // num_videos, pairs % num_videos
        cls_B1D = model.multimodal(texts.text_CLD[text], texts.mask_CL[text], videos.tokens_VND[video], num_tokens=1)
        # In float32 all sure matches would be exactly 1, and tie.
        scores[pairs] = model.match_logits(cls_B1D[:, 0]).double().softmax(dim=1)[:, 1]
    return scores.view(num_texts, num_videos)


def metrics_of(retrieval: Retrieval) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by score and direction."""
    metrics = {}
    for name, scores_CV in retrieval.scores_CV.items():
        to_video = text_to_video_ranks(scores_CV, retrieval.truth_C)
        to_text = video_to_text_ranks(scores_CV, retrieval.truth_C)
        metrics[name] = {
            "text_to_video": asdict(retrieval_metrics(to_video, len(retrieval.clips))),
            "video_to_text": asdict(retrieval_metrics(to_text, len(retrieval.captions))),
        }
    return metrics


def _write(directory: Path, result: dict[str, Any], retrieval: Retrieval) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: scores.numpy() for name, scores in retrieval.scores_CV.items()}
    arrays["keys"] = np.array([clip.key for clip in retrieval.clips])
    arrays["captions"] = np.array(retrieval.captions)
    arrays["truth"] = retrieval.truth_C.numpy()
    np.savez(directory / "scores.npz", **arrays)
    # Last: its presence says that the evaluation is whole.
    text = json.dumps(result, indent=1, ensure_ascii=False)
    aside = directory / ".result.json.partial"
    aside.write_text(text + "\n", encoding="utf-8")
    aside.rename(directory / "result.json")
