"""What ranks say of themselves when they meet, and what that means: which are missing, how their programs differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Caller:
    """What a rank says of itself.

    Attributes:
        host: name of its machine.
        versions: of what must be the same on all ranks, by name.
        token: of its process alone; two processes may take themselves for the same rank.
    """

    host: str
    versions: Mapping[str, str]
    token: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Caller":
        """As it was sent; another version of this package may say more."""
        return cls(values["host"], values["versions"], values["token"])


def describe_absent(there: Mapping[int, Caller], num_ranks: int, timeout_s: float) -> str:
    """Which ranks did not come, and where the others are."""
    absent = [rank for rank in range(num_ranks) if rank not in there]
    hosts = sorted({caller.host for caller in there.values()})
    return (
        f"{in_words(absent)} of {num_ranks} did not come within {timeout_s:g} s; there "
        f"{'is' if len(there) == 1 else 'are'} {in_words(sorted(there))} on {', '.join(hosts)}. Look at what the "
        "missing ones printed: they were not started, ended or gave up before, or cannot reach the first rank"
    )


def describe_differences(callers: Sequence[Caller]) -> str:
    """How the programs of the ranks differ; empty where they do not."""
    lines = []
    for name in sorted({name for caller in callers for name in caller.versions}):
        found: dict[str, list[int]] = {}
        for rank, caller in enumerate(callers):
            found.setdefault(caller.versions.get(name, "none"), []).append(rank)
        if len(found) > 1:
            places = [
                f"{version} on {', '.join(sorted({callers[rank].host for rank in ranks}))} ({in_words(ranks)})"
                for version, ranks in found.items()
            ]
            lines.append(f"{name} {' and '.join(places)}")
    return f"the ranks run different programs: {'; '.join(lines)}. Install the same on all" if lines else ""


def in_words(ranks: Sequence[int]) -> str:
    """Such as ``ranks 0-7, 12``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, run)) for run in runs)}"
