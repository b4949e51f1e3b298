"""The corpus as rows: a manifest, a published annotation file, a folder of media, or tars; see docs/manifests.md.

A row has ``id`` (unique), ``media`` (path or address), ``captions`` (at least one), ``qa``, ``start_s``, ``end_s``,
``split``, ``kind`` and ``license``.
"""

from alpro_stream.manifest.ids import IDS_DTYPE, Survey, refuse_repeated, survey
from alpro_stream.manifest.options import Format, ManifestConfig
from alpro_stream.manifest.places import media_place, public_place
from alpro_stream.manifest.reader import media_root, read_manifest
from alpro_stream.manifest.rows import (
    IMAGE_SUFFIXES,
    KINDS,
    QA,
    VIDEO_SUFFIXES,
    Kind,
    ManifestRow,
    RejectedRow,
    kind_of,
    sample_key,
)
from alpro_stream.manifest.webdataset import tar_paths

__all__ = [
    "IDS_DTYPE",
    "IMAGE_SUFFIXES",
    "KINDS",
    "QA",
    "VIDEO_SUFFIXES",
    "Format",
    "Kind",
    "ManifestConfig",
    "ManifestRow",
    "RejectedRow",
    "Survey",
    "kind_of",
    "media_place",
    "media_root",
    "public_place",
    "read_manifest",
    "refuse_repeated",
    "sample_key",
    "survey",
    "tar_paths",
]
