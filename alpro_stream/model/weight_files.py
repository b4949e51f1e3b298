"""Files of weights: reading those of strangers without running anything in them, and writing our own."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alpro_stream.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
_WRAPPERS = ("model_state", "model_state_dict", "state_dict", "model", "module")
"""Keys under which training programs put the weights beside optimizer state and the like."""

_MAX_WRAPPERS = 4
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of `torch.save`, by name and on the CPU.

    Pickled Python objects are never built (`weights_only`). The wrappers that TimeSformer (``model_state``), LAVIS
    (``model``) and DistributedDataParallel (``module.`` before every name) add are taken off.

    Raises:
        CheckpointError: no such file, a truncated or foreign one, or one that holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"no such weights file: {path}")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_read_torch(path), path)
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    _check_plain(found, path)
    prefix = "module."
    if all(name.startswith(prefix) for name in found):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def save_weights(parameters: Mapping[str, Tensor], path: Path) -> None:
    """Writes the parameters of a model by name, such as its `state_dict`, as safetensors."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or a truncated one: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no file of plain tensors: reading it would run code that it brings along, or it is damaged. "
            "Convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # A truncated zip gives RuntimeError, EOFError, OSError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable file of weights, or a truncated one: {reason}") from error


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_MAX_WRAPPERS):  # A damaged file may hold itself.
        inner = next(
            (key for key in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), None
        )
        if inner is None:
            break
        found = found[inner]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected weights by name")
    for name, value in found.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: {name!r} is no name, expected weights by name")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    return dict(found)


def _check_plain(found: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path}: {name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type}; expected a "
                "dense one of 16, 32 or 64 bit floating point numbers (or of int64, for position ids)"
            )
