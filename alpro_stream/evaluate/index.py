"""An index, opened to be searched."""

import bisect
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpro_stream.errors import ShardError
from alpro_stream.evaluate.index_files import INDEX_FILE, IndexRow, damaged_file, part_path, read_description

_AGAIN = "run the same `alpro embed` again, which makes what is missing"


class Index:
    """The features and rows of an index; rows are numbered through all parts.

    Attributes:
        directory: its folder.
        description: index.json.
        features: of each part, (clips, E) in the stored type, mapped from the disk.

    Args:
        directory: its folder.

    Raises:
        ShardError: there is none, it is not finished, it has no clips, or a file of it is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.description = read_description(directory)
        if self.description.parts is None:
            raise ShardError(f"{directory} is not finished: some parts are missing; {_AGAIN}")
        identity = self.description.identity_sha256()
        for number, part in enumerate(self.description.parts):
            if part.identity_sha256 != identity:
                raise ShardError(
                    f"part {number} of {directory} is of another model or other data than {INDEX_FILE} says; {_AGAIN}"
                )
            if path := damaged_file(directory, number, part):
                raise ShardError(
                    f"{path} is missing or damaged: its SHA-256 is not that of {INDEX_FILE}; remove it, and {_AGAIN}"
                )
        # An empty file cannot be mapped.
        self._numbers = [number for number, part in enumerate(self.description.parts) if part.num_clips]
        if not self._numbers:
            raise ShardError(f"{directory} has no clips: nothing can be found in it; embed data sets that have some")
        self.features = [_map_features(part_path(directory, number, "npy")) for number in self._numbers]
        self._ends = list(accumulate(len(features_NE) for features_NE in self.features))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, number: int) -> IndexRow:
        """What is known of a clip.

        Raises:
            IndexError: no such row.
            ShardError: its part is gone, or was changed, since the index was opened.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        place = bisect.bisect_right(self._ends, number)
        first = self._ends[place] - len(self.features[place])
        return self._rows(place, slice(number - first, number - first + 1))[0]

    def rows(self) -> Iterator[IndexRow]:
        """What is known of all clips, by number.

        Raises:
            ShardError: as `row`.
        """
        for place in range(len(self._numbers)):
            yield from self._rows(place, slice(len(self.features[place])))

    def _rows(self, place: int, which: slice) -> list[IndexRow]:
        path = part_path(self.directory, self._numbers[place], "jsonl")
        try:
            lines = path.read_bytes().split(b"\n")
            return [IndexRow.from_json(line) for line in lines[which]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ShardError(
                f"{path} was removed or changed since the index was opened ({error}); see that the index is there, "
                "and open it again"
            ) from error


def _map_features(path: Path) -> Tensor:
    # Copy on write: torch wants memory that it could write to.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
