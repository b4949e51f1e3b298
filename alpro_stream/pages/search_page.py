"""What the page of a search shows, as plain values: no tensors, no files, no markup."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFrame:
    """A frame of a clip."""

    picture: bytes | str
    """A JPEG or PNG file, which goes into the page; or, on a served page, its address on the same server."""
    time_s: float | None
    """When it is shown in the clip; None where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchHit:
    """A clip that was found."""

    rank: int
    """From 1."""
    key: str
    captions: tuple[str, ...]
    source: str
    """Name of the data set."""
    media: str
    """The file that it was made from; empty where that is not known."""
    similarity: float
    """Cosine of the features (VTC)."""
    match: float | None
    """Probability of a match (VTM), 0 to 1; None where it was not asked for."""
    frames: tuple[SearchFrame, ...]
    """In time order; of a clip that can be played the first is enough."""
    clip: bytes = b""
    """A WebM file of it, which goes into the page; empty where nothing is to be played."""
    note: str = ""
    """Why there are no frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPage:
    """Everything on the page of a search."""

    query: str
    """Empty where nothing was asked for yet."""
    hits: tuple[SearchHit, ...]
    """Best first."""
    num_clips: int
    """Among which they were found."""
    about: str
    """A sentence on index and model."""
    error: str = ""
    """Why there are no hits."""
    is_served: bool = False
    """Whether it has a search box, and asks its server for pictures."""
    max_query_chars: int = 1000
    """Most characters of the search box."""
