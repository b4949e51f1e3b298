"""Everything that touches media files: FFmpeg (through PyAV) for videos, Pillow for images and JPEG.

`open_media` opens a file or what is behind an address; `sparse_frames` gives the few frames of a clip that are stored,
`read_image` the one frame of an image, `stored_video` a whole clip.
"""

from alpro_stream.errors import FetchError, UnreadableError
from alpro_stream.manifest.places import is_address
from alpro_stream.media.frames import SparseFrames, locate_frames, sparse_frames
from alpro_stream.media.images import encode_jpeg, read_image, read_whole_image, square_rgb
from alpro_stream.media.options import FrameConfig, VideoConfig
from alpro_stream.media.probe import SourceInfo
from alpro_stream.media.remote import FetchConfig
from alpro_stream.media.source import digest_of, open_media, window_of
from alpro_stream.media.video import StoredVideo, stored_video

__all__ = [
    "FetchConfig",
    "FetchError",
    "FrameConfig",
    "SourceInfo",
    "SparseFrames",
    "StoredVideo",
    "UnreadableError",
    "VideoConfig",
    "digest_of",
    "encode_jpeg",
    "is_address",
    "locate_frames",
    "open_media",
    "read_image",
    "read_whole_image",
    "sparse_frames",
    "square_rgb",
    "stored_video",
    "window_of",
]
