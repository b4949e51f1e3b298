"""`Alpro`: a trained model for use, from paths and texts to features, scores and answers.

Legend: V videos, T frames, H W pixels, C captions (colours before H), E projection, N video tokens, L text tokens.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import Tensor

from alpro_stream.errors import CheckpointError, ConfigError, DataError, MediaError
from alpro_stream.evaluate.embed import TextEmbeddings, VideoEmbeddings, embed_texts
from alpro_stream.evaluate.matching import matching_scores
from alpro_stream.manifest import kind_of
from alpro_stream.media import FrameConfig, is_address, open_media, read_image, sparse_frames, square_rgb
from alpro_stream.model.alpro import AlproModel
from alpro_stream.model.folder import LoadedModel, ModelDescription, read_model, write_model
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.seeds import Draws
from alpro_stream.train.restore import model_folder

Pixels: TypeAlias = npt.NDArray[np.uint8]
Video: TypeAlias = str | Path | Image.Image | Sequence[Image.Image | Pixels] | Pixels | Tensor
"""One video, or an image: a path or an address, a picture or a sequence of pictures, uint8 pixels (T, H, W, 3) or
(H, W, 3), or a float tensor (T, 3, H, W) that is prepared already (`alpro_stream.model.pixels.normalise`)."""

_BATCH_SIZE = 16


class Answer(NamedTuple):
    """One of the answers that a model was trained to choose from."""

    text: str
    probability: float


class Alpro(
    ModelHubMixin,
    library_name="alpro-stream",
    paper_url="https://arxiv.org/abs/2112.09583",
    license="apache-2.0",
    tags=["video-text-retrieval", "visual-question-answering"],
):
    """A trained model with its tokenizer; `from_pretrained`, `save_pretrained` and `push_to_hub` as elsewhere.

    Attributes:
        description: task, sizes, entities and answers.
        model: the network, in evaluation mode; a `DualEncoder` for a prompter, else an `AlproModel`.
        tokenizer: texts to ids.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.description: ModelDescription = loaded.description
        self.model = loaded.model.eval()
        self.tokenizer = loaded.tokenizer

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str | torch.device | None = None, **hub: Any) -> Self:  # type: ignore[override]
        """Loads a model.

        Args:
            source: a folder of `alpro export` or `save_pretrained`, a run or a checkpoint of it, or a name on the hub.
            device: where it computes; by default the GPU if there is one.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, for a name on the hub.

        Raises:
            CheckpointError: nothing there, or not a whole model of this program.
        """
        path = Path(source)
        if path.exists() and str(source):
            source = model_folder(path)
        elif len(path.parts) != 2 or path.is_absolute() or path.parts[0] in (".", ".."):
            raise CheckpointError(f"{path}: no such folder; give that of an exported model, a run or a checkpoint")
        # The mixin would answer a missing config.json with a warning.
        loaded = cls._from_pretrained(model_id=str(source), **hub)
        return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **hub: Any) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(model_id, **hub))
            except (OSError, ValueError, HfHubHTTPError) as error:
                raise CheckpointError(f"{model_id}: no such folder, and not to be had from the hub: {error}") from error
        return cls(read_model(folder))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(save_directory, self.description, self.model.state_dict(), self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Moves the model, and returns this object."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def encode_video(self, videos: Video | Sequence[Video]) -> Tensor:
        """Features of unit length, (V, E) float32, one row a video; one video gives one row.

        Of a video, `num_frames` frames spread over all of it are seen, each whole and resized to a square.

        Raises:
            MediaError: a file or an address gives no frames; the message names it.
            DataError: pixels of the wrong shape or type, or not finite.
            ConfigError: prepared pixels of another size than the model's, or a model that only answers.
        """
        self._check_features()
        return self._videos(videos).feature_VE

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Features of unit length, (C, E) float32; texts longer than in training are cut.

        Raises:
            DataError: no text.
            ConfigError: a model that only answers.
        """
        self._check_features()
        return self._texts(texts).feature_CE

    def similarity(self, videos: Video | Sequence[Video], texts: str | Sequence[str]) -> Tensor:
        """Cosine of every video with every text, (V, C): what VTC trains, quick to compute from stored features."""
        return self.encode_video(videos) @ self.encode_text(texts).T

    @torch.inference_mode()
    def match(self, videos: Video | Sequence[Video], texts: str | Sequence[str]) -> Tensor:
        """Probability that video and text belong together, of every pair, (V, C) float64: the published score (VTM).

        Raises:
            ConfigError: this model has no matching head.
        """
        model = self._multimodal()
        if model.vtm_head is None:
            raise ConfigError(f"a {self.description.task} model has no matching head; use `similarity`")
        return matching_scores(model, self._texts(texts), self._videos(videos), _BATCH_SIZE).T

    @torch.inference_mode()
    def answer(self, video: Video, question: str, top: int = 5) -> list[Answer]:
        """The likeliest answers to a question about a video, likeliest first.

        Raises:
            ConfigError: this model was not trained to answer questions.
            DataError: more than one question or video, or no answer asked for.
        """
        model = self._multimodal()
        if model.answer_head is None:
            raise ConfigError(
                f"a {self.description.task} model cannot answer: it has no answer head; use one that was fine-tuned "
                "for question answering"
            )
        texts, videos = self._texts(question), self._videos(video)
        if top < 1 or len(texts.feature_CE) != 1 or len(videos.feature_VE) != 1:
            raise DataError(
                f"top={top}, {len(texts.feature_CE)} questions, {len(videos.feature_VE)} videos; expected one question "
                "about one video, and at least one answer"
            )
        cls_B1D = model.multimodal(texts.text_CLD, texts.mask_CL, videos.tokens_VND, num_tokens=1)
        probabilities_A = model.answer_logits(cls_B1D[:, 0]).float().softmax(dim=1)[0]
        order = probabilities_A.argsort(descending=True).tolist()
        # Lists shorter than the published 1500 outputs leave outputs without a text.
        named = [index for index in order if self.description.answers[index]]
        return [Answer(self.description.answers[index], float(probabilities_A[index])) for index in named[:top]]

    def _multimodal(self) -> AlproModel:
        if not isinstance(self.model, AlproModel):
            raise ConfigError("a prompter is a dual encoder and fuses nothing; use `similarity`")
        return self.model

    def _check_features(self) -> None:
        if self.description.task == "question_answering":
            raise ConfigError(
                "the features of a question answering model are not trained: it has `answer`; use a model that was "
                "trained with VTC (prompter, pretrain, retrieval)"
            )

    def _texts(self, texts: str | Sequence[str]) -> TextEmbeddings:
        listed = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if wrong := [text for text in listed if not isinstance(text, str)]:
            raise DataError(f"a text is a {type(wrong[0]).__name__}, expected a str")
        if not listed:
            raise DataError("no text was given")
        return embed_texts(self._loaded.dual, listed, self.tokenizer, _BATCH_SIZE)

    def _videos(self, videos: Video | Sequence[Video]) -> VideoEmbeddings:
        listed = _listed(videos)
        if not listed:
            raise DataError("no video was given")
        encoded = [self._loaded.dual.encode_video(self._prepare(video)[None].to(self.device)) for video in listed]
        return VideoEmbeddings(torch.cat([tokens for tokens, _ in encoded]), torch.cat([f for _, f in encoded]))

    def _prepare(self, video: Video) -> Tensor:
        """video_TCHW, normalised; T is 1 for an image."""
        if isinstance(video, Tensor) and video.is_floating_point():
            return _checked(video, self._loaded.dual.config.video.num_frames)
        frames_THWC = self._frames(video)
        return normalise(torch.from_numpy(frames_THWC)[None])[0]

    def _frames(self, video: Video) -> Pixels:
        """uint8 frames at the model's size: one of an image, else `num_frames`."""
        config = self._loaded.dual.config.video
        if isinstance(video, str | Path):
            stored, is_image = _read(str(video), config.image_size)
        else:
            stored, is_image = _resized(video, config.image_size)
        count = 1 if is_image else config.num_frames
        return np.stack(stored)[choose_frames(len(stored), count, "uniform", Draws("evaluation"))]


def _listed(videos: Video | Sequence[Video]) -> list[Video]:
    """One video is a list of one; a list of pictures is one video; a tensor of five dimensions holds several."""
    if isinstance(videos, str | Path | Image.Image):
        return [videos]
    if isinstance(videos, Tensor | np.ndarray):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, Iterable):
        raise DataError(f"a video is a {type(videos).__name__}; expected a path, an address, pictures or pixels")
    items = list(videos)
    if items and all(_is_picture(item) for item in items):
        return [items]  # type: ignore[list-item]
    return items


def _is_picture(item: object) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | Tensor) and item.ndim == 3)


def _read(place: str, size: int) -> tuple[list[Pixels], bool]:
    """Frames of a file or an address, and whether it is an image."""
    is_image = kind_of(place.partition("?")[0] if is_address(place) else place) == "image"
    options = FrameConfig(size=size)  # the other defaults as `alpro shard`: a file and its shard show the same moments
    try:
        with open_media(place) as file:
            if is_image:
                return [read_image(file, options)[0]], True
            return list(sparse_frames(file, options).frames), False
    except MediaError as error:
        raise MediaError(f"{place}: {error}") from error


def _resized(video: Any, size: int) -> tuple[list[Pixels], bool]:
    """Pictures at the model's size, and whether it was a single one."""
    is_image = _is_picture(video)
    pictures = [video] if is_image else list(video)
    if not pictures:
        raise DataError("a video without frames")
    return [_square(picture, size) for picture in pictures], is_image


def _square(picture: Any, size: int) -> Pixels:
    if isinstance(picture, Image.Image):
        return square_rgb(picture, size)
    if not isinstance(picture, np.ndarray | Tensor):
        raise DataError(f"a frame is a {type(picture).__name__}; expected a PIL picture or pixels")
    is_bytes = picture.dtype in (np.uint8, torch.uint8)
    if not is_bytes or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise DataError(
            f"a frame of shape {tuple(picture.shape)} and type {picture.dtype}; expected uint8 (height, width, 3), "
            "also of a grey picture, or a float tensor (frames, 3, height, width) that is normalised already"
        )
    return square_rgb(Image.fromarray(np.asarray(picture.cpu() if isinstance(picture, Tensor) else picture)), size)


def _checked(video_TCHW: Tensor, num_frames: int) -> Tensor:
    if video_TCHW.ndim != 4 or video_TCHW.shape[0] not in (1, num_frames):
        raise DataError(
            f"prepared pixels of shape {tuple(video_TCHW.shape)}; expected ({num_frames} frames, or 1 of an image, 3, "
            "height, width); give uint8 frames or a path, and frames are chosen for you"
        )
    if not video_TCHW.isfinite().all():
        raise DataError("prepared pixels that are not finite (nan or inf)")
    return video_TCHW.float()
