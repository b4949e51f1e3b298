"""Rows left out on purpose: by duration, size, captions, and by clips in which nothing moves or nothing is seen.

Every reason starts with the name of its filter, so that a report can count them.
"""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from alpro_stream.config import Config
from alpro_stream.manifest import Kind
from alpro_stream.media import SourceInfo

# Of red, green and blue in the brightness that the eye sees (BT.601, which JPEG uses too).
_LUMA = np.array([0.299, 0.587, 0.114])


class FilterConfig(Config):
    """What a row must have to become a sample; every filter is off by default, and a value on a limit passes."""

    min_duration_s: float | None = Field(default=None, ge=0)
    """Shortest clip; images, and videos that do not say how long they are, pass."""
    max_duration_s: float | None = Field(default=None, gt=0)
    """Longest clip."""
    min_side: int | None = Field(default=None, ge=1)
    """Least pixels of the shorter side of the source."""
    max_side: int | None = Field(default=None, ge=1)
    """Most pixels of the longer side of the source."""
    min_aspect_ratio: float | None = Field(default=None, gt=0)
    """Least width divided by height of the source."""
    max_aspect_ratio: float | None = Field(default=None, gt=0)
    """Most width divided by height of the source."""
    min_caption_words: int | None = Field(default=None, ge=1)
    """Fewest words of a caption; captions that do not pass are dropped, and the row with the last one."""
    max_caption_words: int | None = Field(default=None, ge=1)
    """Most words of a caption."""
    max_caption_chars: int | None = Field(default=None, ge=1)
    """Most characters of a caption."""
    min_letters: float | None = Field(default=None, ge=0, le=1)
    """Least share of a caption's characters that are letters (of any script) or spaces."""
    drop_static: float | None = Field(default=None, ge=0, le=255)
    """Drops a clip of several frames whose neighbouring stored frames differ by less than this, averaged over all
    frames, pixels and colours (0-255); videos stored as they are (`payload: video`) are not looked at."""
    drop_black: float | None = Field(default=None, ge=0, le=255)
    """Drops a clip or image whose brightest stored frame has a mean luma below this (0-255); videos stored as they are
    are not looked at."""

    @model_validator(mode="after")
    def _something_passes(self) -> "FilterConfig":
        pairs = (
            ("min_duration_s", "max_duration_s"),
            ("min_aspect_ratio", "max_aspect_ratio"),
            ("min_caption_words", "max_caption_words"),
            ("min_side", "max_side"),
        )
        for least, most in pairs:
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least}={low} is more than {most}={high}, which nothing passes; swap or remove one")
        return self


def usable_captions(captions: Sequence[str], config: FilterConfig) -> tuple[tuple[str, ...], str | None]:
    """The captions that pass, in their order.

    Returns:
        The captions, and why the row is left out when none of them passes (the reason of the first one), else None.
    """
    reasons = [_refuse_caption(caption, config) for caption in captions]
    usable = tuple(caption for caption, reason in zip(captions, reasons, strict=True) if reason is None)
    if usable:
        return usable, None
    return (), reasons[0] if reasons else "caption: there is none, wanted at least one"


def refuse_source(source: SourceInfo, kind: Kind, config: FilterConfig) -> str | None:
    """Why a source is left out for its duration, size or shape; None when it passes.

    Args:
        source: what was found in the file; an unknown duration passes.
        kind: images have no duration, whatever their file says.
        config: the filters.
    """
    duration_s = source.duration_s if kind == "video" else None
    if duration_s is not None:
        reason = _outside("duration", duration_s, config.min_duration_s, config.max_duration_s, " s")
        if reason is not None:
            return reason
    shorter, longer = sorted((source.width, source.height))
    return (
        _outside("shorter side", shorter, config.min_side, None, " pixels")
        or _outside("longer side", longer, None, config.max_side, " pixels")
        or _outside("aspect ratio", source.width / source.height, config.min_aspect_ratio, config.max_aspect_ratio, "")
    )


def refuse_frames(frames: Sequence[NDArray[np.uint8]], config: FilterConfig) -> str | None:
    """Why a clip is left out for what its stored frames show; None when it passes.

    Args:
        frames: uint8 RGB arrays [height, width, 3] of one size, in display order, at least one.
        config: the filters.
    """
    if config.drop_black is not None:
        luma = max(float(frame.mean(axis=(0, 1)) @ _LUMA) for frame in frames)
        if luma < config.drop_black:
            return f"black: luma {luma:.3g} of the brightest frame, wanted at least {config.drop_black:g}"
    if config.drop_static is not None and len(frames) > 1:
        change = _mean_change(frames)
        if change < config.drop_static:
            return f"static: frames change by {change:.3g}, wanted at least {config.drop_static:g}"
    return None


def _mean_change(frames: Sequence[NDArray[np.uint8]]) -> float:
    """Mean absolute difference between neighbours, 0-255."""
    changes = [
        # Unsigned bytes would wrap around below zero.
        float((np.maximum(before, after) - np.minimum(before, after)).mean())
        for before, after in pairwise(frames)
    ]
    return sum(changes) / len(changes)


def _refuse_caption(caption: str, config: FilterConfig) -> str | None:
    reason = _outside(
        "caption words", len(caption.split()), config.min_caption_words, config.max_caption_words, " words"
    ) or _outside("caption length", len(caption), None, config.max_caption_chars, " characters")
    if reason is None and config.min_letters is not None:
        reason = _outside("caption letters", _share_of_letters(caption), config.min_letters, None, " of the characters")
    return reason


def _share_of_letters(caption: str) -> float:
    # Marks are the vowels of many scripts of India and South-East Asia.
    letters = sum(unicodedata.category(char)[0] in "LM" or char.isspace() for char in caption)
    return letters / max(1, len(caption))


def _outside(name: str, value: float, least: float | None, most: float | None, unit: str) -> str | None:
    if least is not None and value < least:
        return f"{name}: {value:.6g}{unit}, wanted at least {least:.6g}{unit}"
    if most is not None and value > most:
        return f"{name}: {value:.6g}{unit}, wanted at most {most:.6g}{unit}"
    return None
