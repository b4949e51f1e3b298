"""WebDataset tars of other tools (video2dataset, img2dataset), read where they are.

A sample is ``key.mp4`` or ``key.jpg`` beside ``key.txt``, ``key.json`` or both. Nothing is decoded. Samples that cannot
be used (no medium, no caption) have no slot.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from alpro_stream.errors import ManifestError, ShardError
from alpro_stream.manifest import Kind, ManifestConfig, ManifestRow, RejectedRow, public_place, read_manifest, tar_paths
from alpro_stream.manifest.columns import Columns, Entry, add_fields
from alpro_stream.manifest.rows import row_from_fields
from alpro_stream.manifest.sidecar import sidecar_values
from alpro_stream.manifest.webdataset import OwnShardError
from alpro_stream.shards.index import Member, ShardIndex, damaged_tar, format_index, grouped_members
from alpro_stream.shards.layout import DatasetInfo, ShardInfo, tar_path
from alpro_stream.shards.sample import SampleMetadata

logger = logging.getLogger(__name__)

IN_PLACE = "in_place"
"""The option of a data set whose tars another tool wrote."""
_COLUMNS = "columns"
_TEXT_FIELDS = ("captions", "question", "answer")
# The index parts its fields by white space, and is UTF-8.
_INDEXABLE_NAME = re.compile(r"[^\s\ud800-\udfff]+")
_NUM_THREADS = 16  # they mostly wait for the disk


class TarSamples(NamedTuple):
    """What a tar holds.

    Attributes:
        kind: of all its samples that can be used; None when there is none.
        rows: the samples that can be used.
        members: of these samples.
        rejected: the others.
    """

    kind: Kind | None
    rows: list[ManifestRow]
    members: list[tuple[Member, ...]]
    rejected: list[RejectedRow]

    def describe(self, tar: Path, sha256: str) -> ShardInfo:
        """The tar as a shard, with the index that it has or could have beside it.

        Args:
            tar: where it lies.
            sha256: what stands for its contents.
        """
        assert self.kind is not None, "a tar without a sample that can be used is no shard"
        return ShardInfo(
            name=tar.stem,
            kind=self.kind,
            num_samples=len(self.rows),
            num_captions=sum(len(row.captions) for row in self.rows),
            num_questions=sum(len(row.qa) for row in self.rows),
            num_bytes=tar.stat().st_size,
            sha256=sha256,
            index_sha256=hashlib.sha256(format_index(self.members)).hexdigest(),
        )


def read_tar(tar: Path, reading: ManifestConfig) -> TarSamples:
    """The samples of a tar, with those that cannot be used apart.

    Args:
        tar: the file.
        reading: which of its values are which field; of the format `webdataset`.

    Raises:
        ManifestError: it cannot be opened, is compressed or a shard of this project.
        ShardError: it is cut off, damaged, mixes videos and images, or members of a sample lie apart.
    """
    rows = list(read_manifest(tar, reading))
    groups, damage = grouped_members(tar)
    if damage is not None:
        raise damaged_tar(tar, damage) from damage
    if tar.suffix != ".tar":
        raise ShardError(f"{tar}: the name of a shard ends in .tar; rename it")
    found = TarSamples(None, [], [], [])
    for row in rows:
        members = groups[row.line - 1]
        if isinstance(row, ManifestRow) and (reason := _unindexable(members)) is not None:
            row = RejectedRow(row.line, row.id, reason)
        if isinstance(row, RejectedRow):
            found.rejected.append(row)
        else:
            found.rows.append(row)
            found.members.append(members)
    kinds = {row.kind for row in found.rows}
    if len(kinds) > 1:
        raise ShardError(
            f"{tar} holds videos and images, and training takes one kind a tar; part it, or shard it with "
            "in_place=false"
        )
    return found._replace(kind=kinds.pop() if kinds else None)


def _unindexable(members: Sequence[Member]) -> str | None:
    """Why the index cannot hold a sample; None when it can."""
    for member in members:
        if not _INDEXABLE_NAME.fullmatch(member.name):
            return f"an index cannot hold the name {member.name!r}: it has white space, or is no UTF-8; rename it"
    return None


def in_place_options(payload: str, columns: Columns) -> dict[str, Any]:
    """The options of a data set of such tars: with what is needed to read their texts again."""
    texts = {field: columns[field] for field in _TEXT_FIELDS if field in columns}
    return {"payload": payload, IN_PLACE: True} | ({_COLUMNS: texts} if texts else {})


def is_foreign(options: Mapping[str, Any]) -> bool:
    """Whether another tool wrote the tars of a data set with these options."""
    return options.get(IN_PLACE) is True


def describe_tars(directory: Path) -> DatasetInfo:
    """The description of a folder of tars that has none, in memory; every tar is read once, headers and texts only.

    The digest of a tar is one of its name, size, members and texts: hashing terabytes takes hours.

    Raises:
        OwnShardError: a tar is a shard of this project.
        ShardError: a tar that is compressed, cut off or damaged, mixes videos and images, or whose members of a sample
            lie apart; no sample that can be used.
    """
    pool = ThreadPoolExecutor(_NUM_THREADS)
    try:
        found = list(pool.map(_read_and_describe, tar_paths(directory)))
    except OwnShardError:
        raise
    except ManifestError as error:
        raise ShardError(str(error)) from error
    except OSError as error:
        raise ShardError(f"the tars of {directory} cannot be read: {error}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    shards = [tar.shard for tar in found if tar.shard is not None]
    num_rejected = sum(tar.num_rejected for tar in found)
    example = next((f", such as {tar.example}" for tar in found if tar.example), "")
    if not shards:
        raise ShardError(
            f"no tar of {directory} has a sample that can be used{example}; expected KEY.mp4 or KEY.jpg beside KEY.txt "
            "or a KEY.json with a caption"
        )
    payload = "video" if any(shard.kind == "video" for shard in shards) else "frames"
    info = DatasetInfo.of_shards(directory.name, in_place_options(payload, {}), shards)
    logger.warning(
        "%s has no dataset.json, and was read as tars of another tool: %d samples in %d tars; %d left out%s. "
        "`alpro shard` with in_place=true writes this down, so that it begins at once",
        directory, info.num_samples, len(shards), num_rejected, example,
    )  # fmt: skip
    return info


class _Described(NamedTuple):
    """A tar as a shard, if it is one, and what was left out of it."""

    shard: ShardInfo | None
    num_rejected: int
    example: str


def _read_and_describe(tar: Path) -> _Described:
    samples = read_tar(tar, _reading({}))
    example = next((f"{row.id!r} of {tar.name}: {row.reason}" for row in samples.rejected), "")
    if samples.kind is None:
        return _Described(None, len(samples.rejected), example)
    digest = hashlib.sha256(f"{tar.name} {tar.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    digest.update(format_index(samples.members))
    for row in samples.rows:
        digest.update(repr((row.captions, row.qa)).encode())
    return _Described(samples.describe(tar, digest.hexdigest()), len(samples.rejected), example)


def index_without_file(tar: Path, shard: ShardInfo, options: Mapping[str, Any]) -> ShardIndex:
    """The index of a tar that has none beside it; of our own shards, a tar that was cut off gives what it still has.

    Args:
        tar: the file.
        shard: its description.
        options: of its data set.

    Raises:
        ShardError: it cannot be read as what the data set says it is.
    """
    num_cut = 0
    if is_foreign(options):
        try:
            samples = read_tar(tar, _reading(_columns(options))).members
        except ManifestError as error:
            raise ShardError(str(error)) from error
    else:
        groups, damage = grouped_members(tar)
        if damage is not None and not damage.cut_off:
            raise damaged_tar(tar, damage) from damage
        samples = [members for members in groups if members]
        num_cut = max(0, shard.num_samples - len(samples)) if damage else 0
    return ShardIndex(format_index(samples), str(tar), num_cut)


def foreign_metadata(
    members: Sequence[Member],
    text: bytes | None,
    metadata: bytes | None,
    *,
    shard: ShardInfo,
    options: Mapping[str, Any],
) -> SampleMetadata:
    """The metadata of a sample that another tool wrote, its captions by the rules of manifests of such tars.

    Args:
        members: of the sample.
        text: contents of its ``.txt``, None when there is none.
        metadata: contents of its ``.json``, None when there is none.
        shard: where it is.
        options: of its data set.

    Raises:
        BadFieldError: there is no caption in them, or they are damaged.
    """
    folder, slash, base = members[0].name.rpartition("/")
    key = base.partition(".")[0]
    values = sidecar_values(text, metadata, one_a_line=False)
    fields: dict[str, Any] = {"id": f"{folder}{slash}{key}", "media": tar_path(Path(), shard.name).name}
    columns: Columns = {"captions": "captions", **_columns(options)}
    entry = Entry(1, {**values, "key": fields["id"], "tar": shard.name, "media": fields["media"], "kind": shard.kind})
    add_fields(fields, columns, entry)
    row = row_from_fields(1, fields)
    return SampleMetadata(
        key=key,
        id=row.id,
        captions=row.captions,
        qa=row.qa,
        kind=shard.kind,
        frame_timestamps_s=(),
        source=_source(values),
    )


def _source(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the other tool's JSON says of the source, where its names mean the same as ours."""
    named = {"media": values.get("url"), "sha256": values.get("sha256"), "license": values.get("license")}
    source = {name: value for name, value in named.items() if isinstance(value, str) and value}
    return {**source, "media": public_place(source["media"])} if "media" in source else source


def _columns(options: Mapping[str, Any]) -> Columns:
    columns = options.get(_COLUMNS)
    return columns if isinstance(columns, dict) else {}


def _reading(columns: Columns) -> ManifestConfig:
    return ManifestConfig(format="webdataset", columns=dict(columns))
