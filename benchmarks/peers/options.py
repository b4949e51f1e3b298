"""What a peer is told: where the data lies and which batches are wanted."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, the same for all peers."""

    data: Path
    """Folder that `run.py prepare` made."""
    clips: int
    """Length of an epoch, where the peer has epochs; the clips are repeated to reach it."""
    batch: int
    frames: int
    crop: int
    """Side of the square that is cut at random out of the frame, pixels."""
    workers: int
    """Loader processes; 0: the batches are made in the main process."""


RESIZED = 256
"""Side to which frames of videos are resized before the crop; that of the stored frames."""
