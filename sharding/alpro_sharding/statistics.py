"""What a report shows of the samples: histograms with fixed edges and counts by name, which add up over shards."""

import math
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from alpro_stream.media import is_address
from alpro_stream.shards import SampleMetadata

_DURATION_EDGES = (0, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, math.inf)
_SIDE_EDGES = (0, 144, 240, 360, 480, 720, 1080, 1440, 2160, 4320, math.inf)
_FRAMES_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, math.inf)
_WORDS_EDGES = (0, 3, 5, 8, 12, 16, 20, 30, 50, 100, math.inf)

_END_OF_HOST = re.compile(r"[/?#]")
# Names beyond this many (a corpus may have a million hosts) are counted together.
_MAX_NAMES = 1000
OTHERS = "others"
LOCAL = "local"
NOT_STATED = "not stated"

Edges = tuple[float, ...]
HistogramValues = tuple[str, str, Edges, tuple[int, ...]]


def _zeros(edges: Edges) -> tuple[int, ...]:
    return (0,) * (len(edges) - 1)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts over samples; ``+`` adds those of other samples.

    Attributes:
        durations: clips by duration; images and unknown durations are not counted.
        sides: samples by the shorter side of their source.
        frames: samples by stored frames.
        caption_words: captions by words.
        codecs: samples by codec or image format.
        licenses: samples by what the manifest says of their licence, `NOT_STATED` among them.
        places: samples by scheme and host of their media, `LOCAL` for files.
    """

    durations: tuple[int, ...] = _zeros(_DURATION_EDGES)
    sides: tuple[int, ...] = _zeros(_SIDE_EDGES)
    frames: tuple[int, ...] = _zeros(_FRAMES_EDGES)
    caption_words: tuple[int, ...] = _zeros(_WORDS_EDGES)
    codecs: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_sample(cls, metadata: SampleMetadata, num_frames: int) -> "Statistics":
        """The statistics of one sample that stores so many frames."""
        source = metadata.source
        durations = [source["duration_s"]] if metadata.kind == "video" and source["duration_s"] is not None else []
        return cls(
            durations=_binned(durations, _DURATION_EDGES),
            sides=_binned([min(source["width"], source["height"])], _SIDE_EDGES),
            frames=_binned([num_frames], _FRAMES_EDGES),
            caption_words=_binned([len(caption.split()) for caption in metadata.captions], _WORDS_EDGES),
            codecs=Counter([source["codec"]]),
            licenses=Counter([source.get("license") or NOT_STATED]),
            places=Counter([_place(source["media"])]),
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            durations=_added(self.durations, other.durations),
            sides=_added(self.sides, other.sides),
            frames=_added(self.frames, other.frames),
            caption_words=_added(self.caption_words, other.caption_words),
            codecs=_merged(self.codecs, other.codecs),
            licenses=_merged(self.licenses, other.licenses),
            places=_merged(self.places, other.places),
        )

    def histograms(self) -> tuple[HistogramValues, ...]:
        """(title, unit, edges, counts) of each histogram; a value on an edge is in the bin above it."""
        return (
            ("Duration", "s", _DURATION_EDGES, self.durations),
            ("Shorter side of the source", "pixels", _SIDE_EDGES, self.sides),
            ("Frames stored", "frames", _FRAMES_EDGES, self.frames),
            ("Caption length", "words", _WORDS_EDGES, self.caption_words),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads; the same statistics give the same values in the same order."""
        return {
            "durations": list(self.durations),
            "sides": list(self.sides),
            "frames": list(self.frames),
            "caption_words": list(self.caption_words),
            "codecs": dict(sorted(self.codecs.items())),
            "licenses": dict(sorted(self.licenses.items())),
            "places": dict(sorted(self.places.items())),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Statistics":
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: other values, such as those of a version with other bins.
        """
        return cls(
            durations=_read_counts(values["durations"], _DURATION_EDGES),
            sides=_read_counts(values["sides"], _SIDE_EDGES),
            frames=_read_counts(values["frames"], _FRAMES_EDGES),
            caption_words=_read_counts(values["caption_words"], _WORDS_EDGES),
            codecs=Counter(values["codecs"]),
            licenses=Counter(values["licenses"]),
            places=Counter(values["places"]),
        )


def _binned(numbers: list[float], edges: Edges) -> tuple[int, ...]:
    counts = list(_zeros(edges))
    for number in numbers:
        counts[bisect_right(edges, number) - 1] += 1
    return tuple(counts)


def _added(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(our + their for our, their in zip(ours, theirs, strict=True))


def _merged(ours: Counter[str], theirs: Counter[str]) -> Counter[str]:
    merged = Counter(ours)
    for name, count in theirs.items():
        merged[name if name in merged or len(merged) < _MAX_NAMES else OTHERS] += count
    return merged


def _place(media: str) -> str:
    if not is_address(media):
        return LOCAL
    scheme, _, rest = media.partition("://")
    # Without the name and password that an address may hold: the card is published.
    host = _END_OF_HOST.split(rest, maxsplit=1)[0].rpartition("@")[2]
    return f"{scheme}://{host}".lower()


def _read_counts(values: list[int], edges: Edges) -> tuple[int, ...]:
    if len(values) != len(edges) - 1:
        raise ValueError(f"{len(values)} bins, expected {len(edges) - 1}")
    return tuple(values)
