"""Writes what describes a shard set, from the ledger alone: every run ends with it, also one that made nothing."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alpro_sharding.config import ShardConfig
from alpro_sharding.duplicates import SampleHashes, find_repeats
from alpro_sharding.entities import vocabulary
from alpro_sharding.ledger import Ledger, Part
from alpro_sharding.reasons import ReasonCounts, describe_reasons
from alpro_sharding.results import HASHES_SUFFIX, Failure, ShardResult, Work, encode_failures
from alpro_sharding.statistics import Statistics
from alpro_stream.config import save_config
from alpro_stream.errors import ShardError
from alpro_stream.manifest import KINDS
from alpro_stream.shards import DatasetInfo, ShardIndex, ShardInfo, save_dataset_info, save_entities
from alpro_stream.shards.exclude import format_exclude
from alpro_stream.shards.layout import CONFIG_FILE, ENTITIES_FILE, FAILURES_FILE, index_path
from alpro_stream.shards.storage import publish_chunks

DUPLICATE_MEDIA_FILE = "duplicate_media.txt"
DUPLICATE_CAPTIONS_FILE = "duplicate_captions.txt"


@dataclass(slots=True)
class Account:
    """What became of every row of a shard set.

    Attributes:
        parts: the manifests.
        splits: description of each split that has samples.
        nouns: all nouns of all splits with their counts.
        statistics: of all samples.
        reasons: of all failures.
        num_failures: rows that gave no sample.
        num_duplicate_media: samples whose media an earlier one of their split has too.
        num_duplicate_captions: samples whose captions an earlier one of their split has too.
        work: (samples, work) of every shard.
    """

    parts: list[Part]
    splits: dict[str, DatasetInfo] = field(default_factory=dict)
    nouns: Counter[str] = field(default_factory=Counter)
    statistics: Statistics = field(default_factory=Statistics)
    reasons: ReasonCounts = field(default_factory=ReasonCounts)
    num_failures: int = 0
    num_duplicate_media: int = 0
    num_duplicate_captions: int = 0
    work: list[tuple[int, Work]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows of all manifests."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_samples(self) -> int:
        """Samples of all splits."""
        return sum(info.num_samples for info in self.splits.values())


def describe(config: ShardConfig, ledger: Ledger) -> Account:
    """Writes ``dataset.json``, ``entities.json`` and the lists of duplicates of every split, and ``failures.jsonl``.

    Raises:
        ShardError: there is no sample at all (the reasons are named), or a shard disappeared meanwhile.
        OSError: the target cannot be written.
    """
    account = Account(ledger.parts())
    for split, names in _names_by_split(ledger, account.parts).items():
        _describe_split(config, ledger, split, names, account)
    publish_chunks(ledger.out / FAILURES_FILE, encode_failures(_failures(ledger, account)))
    if not account.num_rows:
        raise ShardError(f"{config.manifest} holds no rows; expected one for each clip or image")
    if not account.splits:
        raise ShardError(
            f"no sample could be made from {config.manifest}: {account.num_rows} rows; "
            f"{describe_reasons(account.reasons.by_text())}; see {ledger.out / FAILURES_FILE}"
        )
    save_config(config, ledger.out / CONFIG_FILE)
    return account


def _names_by_split(ledger: Ledger, parts: Sequence[Part]) -> dict[str, list[str]]:
    """Names of all shards of each split: videos before images, by number."""
    names: dict[str, list[tuple[int, str]]] = {}
    for part in parts:
        for split, kind, name in ledger.shards_of(part):
            names.setdefault(split, []).append((KINDS.index(kind), name))
    return {split: [name for _, name in sorted(found)] for split, found in sorted(names.items())}


def _describe_split(config: ShardConfig, ledger: Ledger, split: str, names: Sequence[str], account: Account) -> None:
    shards: list[ShardInfo] = []
    nouns: Counter[str] = Counter()
    for name in names:
        result = _result(ledger, split, name)
        if result.shard is None:
            continue
        shards.append(result.shard)
        nouns.update(result.nouns)
        account.statistics = account.statistics + result.statistics
        account.work.append((result.shard.num_samples, result.work))
    if not shards:
        return
    directory = ledger.out / split
    info = DatasetInfo.of_shards(split, config.sample_options(), shards)
    save_entities(directory / ENTITIES_FILE, vocabulary(nouns, config.entities))
    account.nouns.update(nouns)
    _list_duplicates(ledger, directory, shards, account)
    save_dataset_info(directory, info)
    account.splits[split] = info


def _list_duplicates(ledger: Ledger, directory: Path, shards: Sequence[ShardInfo], account: Account) -> None:
    hashes = (
        SampleHashes.from_bytes(ledger.note(directory.name, shard.name).with_suffix(HASHES_SUFFIX).read_bytes())
        for shard in shards
    )
    repeats = find_repeats(hashes)
    keys = _Keys(directory, shards)
    for file, found, what in (
        (DUPLICATE_MEDIA_FILE, repeats.media, "media"),
        (DUPLICATE_CAPTIONS_FILE, repeats.captions, "captions"),
    ):
        entries = ((keys.at(later), f"same {what} as {keys.at(first)}") for later, first in found)
        publish_chunks(directory / file, (line.encode() for line in format_exclude(entries)))
    account.num_duplicate_media += len(repeats.media)
    account.num_duplicate_captions += len(repeats.captions)


class _Keys:
    """Keys of samples by their number in the split; the index read last is kept."""

    def __init__(self, directory: Path, shards: Sequence[ShardInfo]) -> None:
        self._directory = directory
        self._names = [shard.name for shard in shards]
        self._starts = np.cumsum([0, *(shard.num_samples for shard in shards)])
        self._indexes: dict[int, ShardIndex] = {}

    def at(self, number: int) -> str:
        """The key of a sample."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        if place not in self._indexes:
            if len(self._indexes) > 8:
                self._indexes.clear()
            self._indexes[place] = ShardIndex.load(index_path(self._directory, self._names[place]))
        return self._indexes[place].key(number - int(self._starts[place]))


def _failures(ledger: Ledger, account: Account) -> Iterator[tuple[str, Failure]]:
    """Every failure with the name of its manifest, in the order of the manifests; counted on the way."""
    for part in account.parts:
        streams = [ledger.rejected(part), *_streams(ledger, part)]
        for failure in heapq.merge(*streams, key=lambda failure: failure.line):
            account.reasons.add(failure)
            account.num_failures += 1
            yield part.manifest, failure


def _streams(ledger: Ledger, part: Part) -> list[Iterator[Failure]]:
    """The failures of each (split, kind), each in the order of the manifest."""
    groups: dict[tuple[str, str], list[str]] = {}
    for split, kind, name in ledger.shards_of(part):
        groups.setdefault((split, kind), []).append(name)

    def stream(split: str, names: Sequence[str]) -> Iterator[Failure]:
        for name in names:
            yield from _result(ledger, split, name).failures

    return [stream(split, names) for (split, _), names in groups.items()]


def _result(ledger: Ledger, split: str, name: str) -> ShardResult:
    result = ledger.result(split, name)
    if result is None:
        raise ShardError(f"{split}/{name} is not made, or disappeared; run the command of its manifest again")
    return result
