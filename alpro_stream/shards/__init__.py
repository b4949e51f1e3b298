"""The shard format: WebDataset tars of sparse frames, each with an index for random access.

On disk::

    OUT/<split>/video-000000.tar, video-000000.idx, image-000000.tar, ...
    OUT/<split>/dataset.json, entities.json
    OUT/failures.jsonl, shard_config.yaml
"""

from alpro_stream.shards.entities import load_entities, merge_entities, save_entities
from alpro_stream.shards.files import CachedFiles, LocalFiles, ShardFiles
from alpro_stream.shards.foreign import describe_tars
from alpro_stream.shards.index import Member, ShardIndex, index_tar, write_index
from alpro_stream.shards.layout import (
    FORMAT_VERSION,
    DatasetInfo,
    ShardInfo,
    load_dataset_info,
    save_dataset_info,
    shard_name,
)
from alpro_stream.shards.reader import ShardReader
from alpro_stream.shards.sample import Sample, SampleMetadata, VideoFile
from alpro_stream.shards.writer import ShardWriter

__all__ = [
    "FORMAT_VERSION",
    "CachedFiles",
    "DatasetInfo",
    "LocalFiles",
    "Member",
    "Sample",
    "SampleMetadata",
    "ShardFiles",
    "ShardIndex",
    "ShardInfo",
    "ShardReader",
    "ShardWriter",
    "VideoFile",
    "describe_tars",
    "index_tar",
    "load_dataset_info",
    "load_entities",
    "merge_entities",
    "save_dataset_info",
    "save_entities",
    "shard_name",
    "write_index",
]
