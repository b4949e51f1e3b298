"""What is taken from media: the configuration of frames and of stored videos."""

from typing import Any, Literal

from pydantic import Field, field_validator

from alpro_stream.config import Config
from alpro_stream.media.size import Resize

Sampling = Literal["exact", "keyframes"]
"""How frames are chosen: among all frames of a clip, or among its key frames."""

Chroma = Literal["420", "444"]
"""Whether a JPEG stores colour at half the resolution (4:2:0) or at all of it (4:4:4)."""


class FrameConfig(Config):
    """Which frames of a clip are taken, and how they are stored."""

    fps: float = Field(default=3.0, gt=0, le=1000)
    """Frames a second: the frame on display at the clip's start and every ``1 / fps`` seconds after it."""

    max_frames: int = Field(default=64, ge=1, le=1000)
    """Most frames of a clip; a clip that has more keeps this many, spread over all of it."""

    size: int = Field(default=256, ge=16, le=4096)
    """Side of a square frame, or its short side, in pixels."""

    resize: Resize = "square"
    """``square`` ignores the aspect ratio, as published; ``short_side`` keeps it."""

    quality: int = Field(default=90, ge=1, le=95)
    """JPEG quality."""

    chroma: Chroma = "420"
    """JPEG chroma: at half the resolution (``420``) or at all of it (``444``)."""

    sampling: Sampling = "exact"
    """``exact`` decodes for the right frame at each time; ``keyframes`` decodes key frames only, which is many times
    faster and takes at each time the key frame before it."""

    min_frames: int = Field(default=4, ge=1)
    """``keyframes`` falls back to ``exact`` for a clip with fewer key frames than this, when it has more frames."""

    max_pixels: int = Field(default=36_000_000, ge=1)
    """Most pixels of a picture (8K has 33.2 million); a larger one is refused before it is decoded, because a few
    kilobytes can claim gigabytes of pixels."""

    @field_validator("chroma", mode="before")
    @classmethod
    def _as_text(cls, chroma: Any) -> Any:
        return str(chroma) if isinstance(chroma, int) else chroma  # YAML reads 444 as a number


class VideoConfig(Config):
    """How clips are stored when whole videos are, and not frames."""

    reencode: bool = False
    """Whether videos are encoded anew (H.264 in MP4, without sound); otherwise files are stored as they are."""

    keyframe_interval_s: float = Field(default=1.0, gt=0, le=60)
    """When encoding anew: seconds between key frames; short, because a reader starts decoding at one."""

    crf: int = Field(default=23, ge=0, le=51)
    """When encoding anew: x264's constant rate factor; lower is better and larger."""

    short_side: int | None = Field(default=256, ge=16, le=4096)
    """When encoding anew: most pixels of the short side, the aspect ratio kept; null keeps the size. In any case the
    long side has at most 4096, which is what decoders on GPUs take."""
