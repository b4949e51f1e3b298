"""What trainer, prompter and decoder take of the memory, and what there is of it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from alpro_launch.preflight_checks.lines import Line, gib, verdict_of_share

_CGROUPS = Path("/sys/fs/cgroup")
_REMEDY = (
    "raise train.engine.num_micro_batches, set train.engine.activation_checkpointing=true or zero_stage=2, take more "
    "nodes; or less of stream.decode (num_workers, prefetch)"
)


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes of a rank, on the machine or on its GPU.

    Attributes:
        trainer: at most, in a rehearsed step.
        prompter: of its process, which has labelled a batch; 0 without, and where it is part of the trainer.
        decoder: of its processes, or what it took of the GPU.
        other: of the GPU, what was taken before: CUDA itself, and whoever else uses it.
        limit: of the machine, or of this process if that is less; of the GPU all it has.
        limit_of: what sets the limit.
    """

    trainer: int
    prompter: int
    decoder: int
    limit: int
    limit_of: str
    other: int = 0

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.trainer + self.prompter + self.decoder + self.other


def judge_machines(found: Sequence[Use], nodes: Sequence[Sequence[int]], hosts: Sequence[str]) -> list[Line]:
    """One line, of the machine whose ranks together leave least of it."""
    line, _ = max(
        (_judged("memory", [found[rank] for rank in ranks], f" on {hosts[ranks[0]]}") for ranks in nodes),
        key=lambda judged: judged[1],
    )
    return [line]


def judge_gpus(found: Sequence[Use | None], hosts: Sequence[str]) -> list[Line]:
    """One line, of the GPU of which least is left; none without GPUs."""
    on_gpus = [(rank, use) for rank, use in enumerate(found) if use is not None]
    if not on_gpus:
        return []
    line, _ = max(
        (_judged("GPU memory", [use], f" of rank {rank} on {hosts[rank]}") for rank, use in on_gpus),
        key=lambda judged: judged[1],
    )
    return [line]


def _judged(check: str, uses: Sequence[Use], where: str) -> tuple[Line, float]:
    parts = {name: sum(getattr(use, name) for use in uses) for name in ("trainer", "prompter", "decoder", "other")}
    limit, limit_of = min((use.limit, use.limit_of) for use in uses)
    total = sum(parts.values())
    share = total / limit
    split = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    ranks = f", {len(uses)} ranks" if len(uses) > 1 else ""
    text = f"{gib(total)} = {split}{ranks}{where}"
    verdict = verdict_of_share(share)
    return Line(check, text, f"{gib(limit)}, {limit_of}", verdict, "" if verdict == "ok" else _REMEDY), share


def machine_limit() -> tuple[int, str]:
    """Bytes that this process may have at the most together with others of its groups, and what sets that limit."""
    limits = [(psutil.virtual_memory().total, "RAM"), *_cgroup_limits()]
    return min(limits)


def _cgroup_limits() -> Iterator[tuple[int, str]]:
    """Those of this process's control group and of the groups around it, versions 2 and 1."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                yield from _limits_up(_CGROUPS, group, "memory.max")
            elif "memory" in controllers.split(","):
                yield from _limits_up(_CGROUPS / "memory", group, "memory.limit_in_bytes")


def _limits_up(root: Path, group: str, name: str) -> Iterator[tuple[int, str]]:
    folder = root / group.lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # No such file, or "max".
            yield int((place / name).read_text()), "limit of the control group"


def peak_bytes(pid: int | None = None) -> int:
    """Most memory that a process has had, this one by default, since its start or `reset_peak`."""
    return _status_kib("VmHWM", pid) * 1024


def reset_peak(device: torch.device) -> None:
    """The peaks of this process count from now on; where the kernel refuses, that of the machine stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def children_bytes() -> int:
    """Memory of the processes that this one has started, what they share counted in parts."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # It ended meanwhile.
            total += child.memory_full_info().pss
    return total


def _status_kib(field: str, pid: int | None) -> int:
    text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8")
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:")), 0)


def gpu_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that are taken, by any process, and all it has; 0 of a CPU."""
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total
