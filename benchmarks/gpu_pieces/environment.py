"""What is here to measure with: the GPU, its driver, versions, and what is missing; found without using the GPU.

``python -m benchmarks.gpu_pieces.environment`` prints it as JSON. It is a process of its own, as a driver in trouble
can keep whoever asks it waiting for ever.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine

MADE_FOR = {"python": "3.12", "torch": "2.11", "cuda": "13.0", "transformers": "5.17", "nvidia-dali-cuda130": "2.4"}
"""Versions, or how they begin, that this is meant to run on; others are said, and tried."""

_MODULES = {
    "nvidia.dali": "NVIDIA DALI: decoding on the GPU",
    "deepspeed": "training and its ZeRO stages",
    "av": "videos, and whatever reads the stream",
    "simplejpeg": "frames decoded on the CPU",
    "pydantic": "every configuration",
    "omegaconf": "every configuration",
    "timm": "the video encoder",
    "transformers": "the text encoder",
    "pytest": "the tests",
    "pytest_timeout": "the tests",
    "hypothesis": "the tests",
}
_QUERY = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")


def look() -> dict[str, Any]:
    """Machine, versions and commit as in all results; the GPU; what is missing."""
    found: dict[str, Any] = {"machine": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
    found["missing"] = {name: what for name, what in _MODULES.items() if not _is_there(name)}
    found["gpu"] = _gpu()
    return found


def ask(seconds: float, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`look` in a process of its own.

    Raises:
        RuntimeError: it gave no answer; the message says what it said.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_pieces.environment"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"PyTorch did not say within {seconds:g} s which GPU it sees; look at nvidia-smi") from None
    if done.returncode:
        raise RuntimeError(f"PyTorch cannot be used here: {(done.stderr.strip().splitlines() or ['it crashed'])[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def differences(found: Mapping[str, Any]) -> list[str]:
    """Where versions are not those that this is made for, a line each."""
    versions = {**found["versions"], **({"cuda": found["gpu"]["cuda"]} if found["gpu"] else {})}
    return [
        f"{name} {versions.get(name, 'is missing')}; this is made for {wanted}"
        for name, wanted in MADE_FOR.items()
        if not f"{versions.get(name, '')}.".startswith(f"{wanted}.") and (name != "cuda" or found["gpu"])
    ]


def _gpu() -> dict[str, Any] | None:
    """The first GPU, as PyTorch and the driver describe it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "driver": _ask_driver(),
    }


def _ask_driver() -> dict[str, str]:
    """What `nvidia-smi` says of the first GPU; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_driver(done.stdout, _QUERY)


def parse_driver(text: str, names: Sequence[str]) -> dict[str, str]:
    """The first line of `nvidia-smi`'s answer by name; nothing if it is not what was asked for."""
    values = [value.strip() for value in (text.strip().splitlines() or [""])[0].split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


if __name__ == "__main__":
    print(json.dumps(look()))
