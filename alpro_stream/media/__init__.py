"""Everything that touches media files: FFmpeg (through PyAV) for videos, Pillow for images and JPEG.

`sparse_frames` gives the few frames of a clip that are stored, `read_image` the one frame of an image, `fetched` the
file behind an address.
"""

from alpro_stream.media.container import UnreadableError
from alpro_stream.media.frames import SparseFrames, sparse_frames
from alpro_stream.media.images import encode_jpeg, read_image, square_rgb
from alpro_stream.media.probe import SourceInfo, probe_video
from alpro_stream.media.remote import fetched, is_address

__all__ = [
    "SourceInfo",
    "SparseFrames",
    "UnreadableError",
    "encode_jpeg",
    "fetched",
    "is_address",
    "probe_video",
    "read_image",
    "sparse_frames",
    "square_rgb",
]
