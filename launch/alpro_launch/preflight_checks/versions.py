"""Whether all ranks run the same software."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from alpro_launch.preflight_checks.lines import Line, Verdict
from alpro_stream.train.checkpoint import code_version

_PACKAGES = ("alpro-stream", "torch", "deepspeed", "transformers", "timm")
_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
_NONE = "none"
# Nodes of one cluster are seldom updated at the same time, and one driver serves several versions of CUDA.
_MAY_DIFFER = ("driver",)
_MOST_HOSTS = 3


def measure_versions() -> dict[str, str]:
    """What this rank runs; ``none`` where something is not there."""
    commit = code_version()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _NONE if commit == _version("alpro-stream") else commit,
        "DALI": next((found for name in _DALI if (found := _version(name)) != _NONE), _NONE),
        "CUDA": str(torch.version.cuda or _NONE) if torch.cuda.is_available() else _NONE,
        "driver": _driver(),
    }


def judge_versions(found: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Line]:
    """One line: what all have, or who differs in what."""
    first = found[0]
    unlike = [name for name in first if len({versions[name] for versions in found}) > 1]
    if not unlike:
        text = ", ".join(f"{name} {value[:12]}" for name, value in first.items() if value != _NONE)
        return [Line("versions", text, _all(len(found)))]
    text = "; ".join(f"{name}: {_by_host([versions[name] for versions in found], hosts)}" for name in unlike)
    verdict: Verdict = "warn" if set(unlike) <= {*_MAY_DIFFER} else "FAIL"
    return [Line("versions", text, _all(len(found)), verdict, "install the same versions on all hosts")]


def _all(num_ranks: int) -> str:
    return f"equal on all {num_ranks} ranks" if num_ranks > 1 else "one rank"


def _by_host(versions: Sequence[str], hosts: Sequence[str]) -> str:
    """``2.11.0 on node1; 2.10.0 on node2``: the most frequent version first."""
    where: dict[str, list[str]] = {}
    for value, host in zip(versions, hosts, strict=True):
        where.setdefault(value, []).append(host)
    texts = []
    for value, found in sorted(where.items(), key=lambda item: -len(item[1])):
        names = list(dict.fromkeys(found))
        more = f" and {len(names) - _MOST_HOSTS} more" if len(names) > _MOST_HOSTS else ""
        texts.append(f"{value} on {', '.join(names[:_MOST_HOSTS])}{more}")
    return ", ".join(texts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _NONE


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return _NONE
    match = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return match[1] if match else _NONE
