"""Which texts ask for which videos. Legend: C captions; `truth_C` is the video of each caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alpro_stream.errors import DataError
from alpro_stream.evaluate.embed import StoredClip
from alpro_stream.evaluate.result import digest_of
from alpro_stream.stream.text import Tokenizer

CaptionUse = Literal["all", "first", "joined"]

_STOP_WORDS = """
a about above after again all am an and any are as at be been before being below between both but by can could did do
does doing down during each few for from further had has have having he her here hers him his how i if in into is it its
just me more most my no nor not now of off on once only or other our out over own same she should so some such than that
the their them then there these they this those through to too under until up very was we were what when where which
while who whom why will with would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""English words that say nothing of what a video shows."""


@dataclass(frozen=True)
class Queries:
    """Captions and the number of the video of each."""

    captions: list[str]
    truth_C: Tensor


def queries_of(clips: Sequence[StoredClip], use: CaptionUse = "all") -> Queries:
    """The captions that stand for the videos.

    Args:
        clips: the videos.
        use: all captions of a video, each a query of its own; the first one; or all joined in their order to one text,
            which is paragraph retrieval (DiDeMo).

    Raises:
        DataError: there is none.
    """
    chosen = [_chosen(clip, use) for clip in clips]
    captions = [caption for own in chosen for caption in own]
    if not captions:
        raise DataError(
            f"{len(clips)} videos and images, and no caption (questions are none): retrieval asks for them by their "
            "captions. Shard the split with captions, or name other sources"
        )
    return Queries(captions, torch.tensor([number for number, own in enumerate(chosen) for _ in own]))


def captions_of(clip: StoredClip) -> list[str]:
    """Its captions; where there is none, a question stands in for it in the shards, and is left out here."""
    return [caption for caption in clip.captions if caption not in clip.questions]


def _chosen(clip: StoredClip, use: CaptionUse) -> list[str]:
    captions = captions_of(clip)
    if use == "joined" and captions:
        return [" ".join(caption.strip() for caption in captions)]
    return captions if use == "all" else captions[:1]


def split_digest(clips: Sequence[StoredClip], use: CaptionUse) -> str:
    """SHA-256 of the keys with the captions that are used, whatever shards they lie in and in whatever order."""
    return digest_of(sorted([clip.key, _chosen(clip, use)] for clip in clips))


@dataclass(frozen=True)
class Texts:
    """What differs among captions: each is encoded and compared once, so that equal ones have equal scores.

    The same text in another place of a batch would have another last digit, and whether it ties would be chance.

    Attributes:
        texts: one caption of each kind.
        text_C: which of them a caption is.
    """

    texts: list[str]
    text_C: Tensor

    def num_of_several(self, truth_C: Tensor) -> int:
        """Captions whose text another video has too."""
        of_videos = set(zip(self.text_C.tolist(), truth_C.tolist(), strict=True))
        counts_U = torch.tensor([text for text, _ in of_videos]).bincount(minlength=len(self.texts))
        return int((counts_U[self.text_C] > 1).sum())


def different_texts(captions: Sequence[str], tokenizer: Tokenizer, num_tokens: int | None = None) -> Texts:
    """Captions by what a model reads of them; capitals may make no difference, nor does what is cut.

    Args:
        captions: of all videos.
        tokenizer: of the model.
        num_tokens: that it reads; None as in training.
    """
    numbers: dict[tuple[int, ...], int] = {}
    texts: list[str] = []
    text_C = []
    for caption, read_L in zip(captions, torch.cat(tokenizer(captions, num_tokens), dim=1).tolist(), strict=True):
        number = numbers.setdefault(tuple(read_L), len(texts))
        if number == len(texts):
            texts.append(caption)
        text_C.append(number)
    return Texts(texts, torch.tensor(text_C))


def captions_per_video(queries: Queries, num_videos: int) -> tuple[int, int]:
    """Fewest and most queries for a video."""
    counts_V = queries.truth_C.bincount(minlength=num_videos)
    return int(counts_V.min()), int(counts_V.max())


@dataclass(frozen=True)
class OddCaptions:
    """How many captions are queries like all others, and cannot be answered by what they say.

    Attributes:
        empty: without a word.
        stop_words: with none but `STOP_WORDS`.
        cut: longer than what the model reads.
    """

    empty: int
    stop_words: int
    cut: int

    def __str__(self) -> str:
        texts = (
            f"{self.empty} empty",
            f"{self.stop_words} of nothing but stop words",
            f"{self.cut} cut to the length of a text",
        )
        return ", ".join(text for text in texts if not text.startswith("0 "))


def odd_captions(captions: Sequence[str], tokenizer: Tokenizer, num_tokens: int) -> OddCaptions:
    """Counts captions that say nothing, and those of more than `num_tokens` tokens."""
    words = [[word.strip(".,;:!?\"'()").lower() for word in caption.split()] for caption in captions]
    # One token more than the model reads: where it is no padding, something is cut.
    _, mask_CL = tokenizer(captions, num_tokens + 1)
    return OddCaptions(
        empty=sum(not any(own) for own in words),
        stop_words=sum(any(own) and all(word in STOP_WORDS or not word for word in own) for own in words),
        cut=int(mask_CL[:, -1].sum()),
    )
