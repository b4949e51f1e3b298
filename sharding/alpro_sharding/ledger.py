"""What is planned and what is done, so that a run after a crash does only what is missing.

In ``OUT/.ledger``: ``plan.json`` (the options that decide the bytes, and the manifest's digest) and one result a shard,
``<split>/<shard>.json``, published after the shard itself. A shard without a result is made again.
"""

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from alpro_sharding.worker import ShardResult
from alpro_stream.config import differences
from alpro_stream.errors import ManifestError, ShardError
from alpro_stream.manifest import KINDS
from alpro_stream.shards.layout import index_path, tar_path
from alpro_stream.shards.storage import publish_bytes, remove_temporaries

LEDGER_VERSION = 1
LEDGER_FOLDER = ".ledger"


@dataclass(frozen=True, slots=True)
class ManifestDigest:
    """Identity and size of a manifest."""

    sha256: str
    num_lines: int


def digest_manifest(path: Path) -> ManifestDigest:
    """Reads the manifest once for its digest and its number of lines.

    Raises:
        ManifestError: it is missing or cannot be read.
    """
    digest, num_lines, last = hashlib.sha256(), 0, b"\n"
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                num_lines += chunk.count(b"\n")
                last = chunk
    except OSError as error:
        raise ManifestError(f"cannot read the manifest {path}: {error.strerror or error}") from error
    return ManifestDigest(digest.hexdigest(), num_lines + (not last.endswith(b"\n")))


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
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = (self._root / "lock").open("w")
        except OSError as error:
            raise ShardError(f"cannot write to {out}: {error.strerror or error}; choose another `out`") from error
        try:
            self._take_lock()
            self._check_plan({"version": LEDGER_VERSION, **plan})
        except BaseException:
            self._lock.close()
            raise

    def directory(self, split: str) -> Path:
        """The folder of a split, made when it is not there, cleared of what killed workers left behind."""
        directory, results = self.out / split, self._root / split
        for folder in (directory, results):
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(folder)
        return directory

    def result_path(self, split: str, name: str) -> Path:
        """Where a worker notes the result of a shard."""
        return self._root / split / f"{name}.json"

    def result(self, split: str, name: str) -> ShardResult | None:
        """The noted result of a shard; None when it is not done, or its files are not there any more."""
        try:
            result = ShardResult.from_json(self.result_path(split, name).read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if result.shard is None:
            return result
        tar, index = tar_path(self.out / split, name), index_path(self.out / split, name)
        intact = tar.is_file() and index.is_file() and tar.stat().st_size == result.shard.num_bytes
        return result if intact else None

    def close(self) -> None:
        """Lets another run use the folder."""
        self._lock.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"another `alpro shard` is writing to {self.out}; wait for it, or choose another `out`"
            ) from error

    def _check_plan(self, plan: dict[str, Any]) -> None:
        path = self._root / "plan.json"
        if not path.exists():
            publish_bytes(path, json.dumps(plan, indent=2).encode())
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ShardError(f"{path} cannot be read: {error}; remove {self.out} or choose another `out`") from error
        changed = differences(found, plan)
        if changed and self._first_tar() is None:
            # Nothing was made under the old plan: notes on rows that failed are all that is left of it.
            for note in self._root.glob("*/*.json"):
                note.unlink()
            publish_bytes(path, json.dumps(plan, indent=2).encode())
        elif changed:
            raise ShardError(
                f"{self.out} holds shards of another plan (there != now): {'; '.join(changed)}. "
                "Give this run another `out`, remove that folder, or go back to the old settings"
            )

    def _refuse_foreign_shards(self) -> None:
        if (found := self._first_tar()) is not None:
            raise ShardError(f"{found} was not made by a run that left a ledger; choose another `out`")

    def _first_tar(self) -> Path | None:
        return next((tar for kind in KINDS for tar in self.out.glob(f"*/{kind}-*.tar")), None)
