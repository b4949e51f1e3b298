"""What a measurement was made on: the machine, the versions, the commit. No names, no paths."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]
_PACKAGES = (
    "alpro-stream",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tokenizers",
    "deepspeed",
    "ray",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "av",
    "numpy",
    "pillow",
    "webdataset",
)


def describe() -> dict[str, Any]:
    """CPU model, cores and memory that this process may use, and the GPUs that torch sees."""
    return {
        "system": platform.system(),
        "cpu": _cpu_model(),
        "num_cores": _num_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": _gpus(),
    }


def versions() -> dict[str, str]:
    """Python and those of the packages that decide about speed which are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(repository: Path = _CHECKOUT) -> str:
    """The commit of the checkout, with ``+dirty`` if files differ from it; "unknown" outside of git.

    Results written earlier under ``benchmarks/results`` do not count as a difference.
    """
    head = _git(repository, "rev-parse", "--verify", "HEAD")
    if head is None:
        return "unknown"
    changes = _git(repository, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}+dirty" if changes else head


def _git(repository: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()


def _num_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores this process may use: its affinity, or the container's quota where that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    if cpu_max.is_file():
        quota, _, period = cpu_max.read_text(encoding="utf-8").strip().partition(" ")
        if quota != "max":
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def _memory_bytes(memory_max: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory_max.is_file():
        limit = memory_max.read_text(encoding="utf-8").strip()
        if limit != "max":
            return min(installed, int(limit))
    return installed


def _gpus() -> list[dict[str, Any]]:
    # Imported here: most benchmarks of the input side measure without torch in the process.
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)} for device in devices]
