"""What is planned and what is done, so that a run after a crash does only what is missing.

In ``OUT/.ledger``::

    plan.json                       the options that decide the bytes
    _parts/00000.json                  a manifest: its digest, its rows, the numbers of its shards
    _parts/00000.ids                   digests of its ids, sorted, 16 bytes each
    _parts/00000.rejected.jsonl        its rows that cannot be used
    <split>/<shard>.json            what became of a shard, published after the shard itself
    <split>/<shard>.hashes          hashes of its media and captions, to find duplicates
    <split>/<shard>.digests         digests that its tar may have; another tar is not built upon
    <split>/<shard>.running         how far the worker of a shard is

A shard without a ``.json`` is made again.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from alpro_sharding.assign import Group
from alpro_sharding.results import HASHES_SUFFIX, RUNNING_SUFFIX, Failure, ShardResult, read_note
from alpro_stream.config import differences
from alpro_stream.errors import ShardError, WriteError
from alpro_stream.manifest import KINDS, Kind
from alpro_stream.shards.layout import index_path, shard_name, tar_path
from alpro_stream.shards.storage import publish, publish_bytes, remove_temporaries, temporary_beside

LEDGER_VERSION = 2
LEDGER_FOLDER = ".ledger"
_PARTS_FOLDER = "_parts"  # no split can have this name
_REJECTED_SUFFIX = ".rejected.jsonl"


@dataclass(frozen=True, slots=True)
class Part:
    """A manifest of the shard set.

    Attributes:
        number: 0 for the first manifest, then on in the order in which they were appended.
        manifest: its file name.
        digest: SHA-256 over its rows.
        num_rows: rows, those that cannot be used included.
        media_root: what its relative media paths start from.
        first_numbers: the number of its first shard, by (split, kind).
        num_shards: how many shards it gives, by (split, kind); None until all of it was planned once.
    """

    number: int
    manifest: str
    digest: str
    num_rows: int
    media_root: str
    first_numbers: dict[Group, int]
    num_shards: dict[Group, int] | None = None

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        values = {
            **asdict(self),
            "first_numbers": _spell(self.first_numbers),
            "num_shards": None if self.num_shards is None else _spell(self.num_shards),
        }
        return json.dumps(values, indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Part":
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: other bytes.
        """
        values = json.loads(data)
        values["first_numbers"] = _read_groups(values["first_numbers"])
        if values["num_shards"] is not None:
            values["num_shards"] = _read_groups(values["num_shards"])
        return cls(**values)


class Ledger:
    """The ledger of one output folder, held by one run at a time.

    Args:
        out: the output folder; made when it is not there.
        plan: plain values that decide the bytes of the shards.

    Raises:
        ShardError: the folder belongs to another plan (the differences are named), holds shards of unknown origin, is
            in use by another run, or cannot be written.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self.out = out
        self._root = out / LEDGER_FOLDER
        try:
            if not self._root.exists():
                self._refuse_foreign_shards()
            (self._root / _PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = (self._root / "_lock").open("w")
            try:
                self._take_lock()
                remove_temporaries(self._root / _PARTS_FOLDER)
                self._check_plan({"version": LEDGER_VERSION, **plan})
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise WriteError(f"cannot write to {out}: {error.strerror or error}; choose another `out`") from error

    def directory(self, split: str) -> Path:
        """The folder of a split, made when it is not there, cleared of what killed workers left behind."""
        directory = self.out / split
        for folder in (directory, self._root / split):
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers(split)
        return directory

    def remove_leftovers(self) -> None:
        """Removes what workers left behind that were killed in this run."""
        for split in sorted({split for part in self.parts() for split, _ in part.num_shards or ()}):
            self._remove_leftovers(split)

    def note(self, split: str, name: str) -> Path:
        """Where a worker notes what became of a shard."""
        return self._root / split / f"{name}.json"

    def result(self, split: str, name: str) -> ShardResult | None:
        """What became of a shard; None when it is not done, or its files are not there any more."""
        result = read_note(self.note(split, name))
        if result is None or result.shard is None:
            return result
        tar, index = tar_path(self.out / split, name), index_path(self.out / split, name)
        hashes = self.note(split, name).with_suffix(HASHES_SUFFIX)
        intact = tar.is_file() and index.is_file() and hashes.is_file() and tar.stat().st_size == result.shard.num_bytes
        return result if intact else None

    def num_running_rows(self, split: str, name: str) -> int:
        """How many rows the worker of a shard has done so far."""
        try:
            return int(self.note(split, name).with_suffix(RUNNING_SUFFIX).read_text())
        except (OSError, ValueError):
            return 0

    def parts(self) -> list[Part]:
        """The manifests of the shard set, in the order in which they came.

        Raises:
            ShardError: a note on one is damaged.
        """
        return list(read_parts(self._root))

    def open_part(
        self, manifest: str, digest: str, num_rows: int, media_root: str, *, append: bool, moved_media: bool = False
    ) -> Part:
        """The part of this manifest: the one that is there, or a new one.

        Args:
            manifest: its file name.
            digest: SHA-256 over its rows.
            num_rows: rows, those that cannot be used included.
            media_root: what relative media paths start from.
            append: whether it may be added to others.
            moved_media: whether the media may be elsewhere than when its shards were begun.

        Raises:
            ShardError: the shard set is of another manifest and `append` is false, an earlier manifest is not done, or
                the media are elsewhere.
        """
        parts = self.parts()
        for part in parts:
            if part.digest == digest:
                return self._with_media_at(part, media_root, moved_media)
        if parts and not append and self._first_tar() is None:
            self._forget()
            parts = []
        if parts and not append:
            have = "; ".join(f"{part.manifest!r} ({part.num_rows} rows, digest {part.digest[:12]})" for part in parts)
            raise ShardError(
                f"{self.out} holds shards of another manifest: {have}; now {manifest!r} ({num_rows} rows, digest "
                f"{digest[:12]}). Add its rows with append=true, give this run another `out`, or remove that folder"
            )
        firsts: dict[Group, int] = {}
        for part in parts:
            missing = [f"{split}/{name}" for split, _, name in self.shards_of(part) if self.result(split, name) is None]
            if part.num_shards is None or missing:
                raise ShardError(
                    f"{self.out}: the shards of {part.manifest!r} are not all made; finish that manifest first, "
                    "then append"
                )
            for group, count in part.num_shards.items():
                firsts[group] = firsts.get(group, 0) + count
        if any(part.manifest == manifest for part in parts):
            manifest = f"{manifest} (part {len(parts)})"
        part = Part(len(parts), manifest, digest, num_rows, media_root, firsts)
        self.save_part(part)
        return part

    def _with_media_at(self, part: Part, media_root: str, moved: bool) -> Part:
        if part.media_root == media_root:
            return part
        if not moved:
            raise ShardError(
                f"the shards of {part.manifest!r} were begun with media in {part.media_root}, now it is {media_root}; "
                "other media do not mix with them. If the same files were moved, say so with moved_media=true"
            )
        part = replace(part, media_root=media_root)
        self.save_part(part)
        return part

    def save_part(self, part: Part) -> None:
        """Notes a manifest, or that all of it was planned."""
        publish_bytes(self._part_path(part, ".json"), part.to_json())

    def shards_of(self, part: Part) -> Iterator[tuple[str, Kind, str]]:
        """(split, kind, name) of every shard of a manifest that was planned."""
        for (split, kind), count in sorted((part.num_shards or {}).items()):
            first = part.first_numbers.get((split, kind), 0)
            for number in range(first, first + count):
                yield split, kind, shard_name(kind, number)

    def ids_path(self, part: Part) -> Path:
        """Where the sorted digests of a manifest's ids lie."""
        return self._part_path(part, ".ids")

    def rejected_path(self, part: Part) -> Path:
        """Where a manifest's rows that cannot be used are listed."""
        return self._part_path(part, _REJECTED_SUFFIX)

    def rejected(self, part: Part) -> Iterator[Failure]:
        """The rows of a manifest that cannot be used, in its order."""
        with self.rejected_path(part).open(encoding="ascii") as file:
            for line in file:
                yield Failure(**json.loads(line))

    def close(self) -> None:
        """Lets another run use the folder."""
        self._lock.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _part_path(self, part: Part, suffix: str) -> Path:
        return self._root / _PARTS_FOLDER / f"{part.number:05d}{suffix}"

    def _remove_leftovers(self, split: str) -> None:
        remove_temporaries(self.out / split)
        remove_temporaries(self._root / split)
        for leftover in (self._root / split).glob(f"*{RUNNING_SUFFIX}"):
            leftover.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"another `alpro shard` is writing to {self.out}; wait for it, or choose another `out`"
            ) from error

    def _check_plan(self, plan: dict[str, Any]) -> None:
        path = self._root / "plan.json"
        text = json.dumps(plan, indent=2).encode()
        if not path.exists():
            publish_bytes(path, text)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ShardError(f"{path} cannot be read: {error}; remove {self.out} or choose another `out`") from error
        changed = differences(found, json.loads(text))
        if changed and self._first_tar() is None:
            # Nothing was made under the old plan: notes on rows that failed are all that is left of it.
            self._forget()
            publish_bytes(path, text)
        elif changed:
            raise ShardError(
                f"{self.out} holds shards of another plan (there != now): {'; '.join(changed)}. "
                "Give this run another `out`, remove that folder, or go back to the old settings"
            )

    def _forget(self) -> None:
        """Drops the notes of a plan under which nothing was made."""
        for note in self._root.glob("*/*.json"):
            note.unlink()

    def _refuse_foreign_shards(self) -> None:
        if (found := self._first_tar()) is not None:
            raise ShardError(f"{found} was not made by a run that left a ledger; choose another `out`")

    def _first_tar(self) -> Path | None:
        return next((tar for kind in KINDS for tar in self.out.glob(f"*/{kind}-*.tar")), None)


def overview(out: Path) -> dict[str, Any]:
    """What is planned, under way, done and failed in the folder of a shard set; may be asked while a job runs.

    Raises:
        ShardError: there is no ledger, or it is damaged.
    """
    root = out / LEDGER_FOLDER
    parts = list(read_parts(root)) if root.is_dir() else []
    if not parts:
        raise ShardError(f"{out} has no ledger: `alpro shard` has not planned anything there")
    splits: dict[str, Any] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != _PARTS_FOLDER):
        results = [result for path in folder.glob("*.json") if (result := read_note(path)) is not None]
        splits[folder.name] = {
            "shards_planned": _num_planned(parts, folder.name),
            "shards_running": len(list(folder.glob(f"*{RUNNING_SUFFIX}"))),
            "shards_done": len(results),
            "rows_done": sum(result.num_rows for result in results),
            "rows_failed": sum(len(result.failures) for result in results),
            "rows_to_retry": sum(result.num_to_retry for result in results),
        }
    manifests = [
        {"manifest": part.manifest, "rows": part.num_rows, "rows_rejected": _num_rejected(root, part)} for part in parts
    ]
    return {"manifests": manifests, "splits": splits}


def _num_rejected(root: Path, part: Part) -> int | None:
    """Rows that a manifest itself fails; None as long as it is not planned to its end."""
    try:
        with (root / _PARTS_FOLDER / f"{part.number:05d}{_REJECTED_SUFFIX}").open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return None


def _num_planned(parts: Sequence[Part], split: str) -> int | None:
    """Shards of a split; None as long as a manifest is not planned to its end."""
    counts = [part.num_shards for part in parts]
    if any(count is None for count in counts):
        return None
    return sum(number for count in counts for (of, _), number in (count or {}).items() if of == split)


class RejectedRows:
    """The list of a manifest's rows that cannot be used, written as they are found, published when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_beside(path)
        self._file = self._temporary.open("wb")

    def add(self, failure: Failure) -> None:
        """Appends one."""
        self._file.write(json.dumps(asdict(failure)).encode() + b"\n")

    def publish(self) -> None:
        """Makes the list appear under its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(self._temporary, self._path)


def read_parts(root: Path) -> Iterator[Part]:
    """The manifests that a ledger's folder knows, in order.

    Raises:
        ShardError: a note on one is damaged.
    """
    for path in sorted((root / _PARTS_FOLDER).glob("*.json")):
        try:
            yield Part.from_json(path.read_bytes())
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{path} cannot be read: {error!r}; remove the shard set or choose another `out`"
            raise ShardError(reason) from error


def _spell(groups: dict[Group, int]) -> dict[str, int]:
    return {f"{split}/{kind}": number for (split, kind), number in sorted(groups.items())}


def _read_groups(values: dict[str, int]) -> dict[Group, int]:
    groups: dict[Group, int] = {}
    for name, number in values.items():
        split, _, kind = name.partition("/")
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}")
        groups[split, KINDS[KINDS.index(kind)]] = number
    return groups
