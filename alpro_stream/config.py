"""Configuration: YAML files with dotted overrides, validated by pydantic models that forbid unknown keys.

The models live beside the components they configure; this module only knows how to read them.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from alpro_stream.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration model: immutable; an unknown key, or a number that is not finite, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)

_INTERPOLATED = re.compile(r"\$\{(\w+)\}")


def load_config(model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file, applies ``key.path=value`` overrides and validates the result.

    Args:
        model: the pydantic model of the whole file.
        path: the YAML file; ``${...}`` interpolations are OmegaConf's. A key at the top level that the model does not
            have, and that the file uses as ``${key}``, is only a name for that.
        overrides: dotted assignments, the last one wins.

    Raises:
        ConfigError: a missing file, broken YAML, an unknown key (the nearest known one is named) or a
            value of the wrong type.
    """
    values = read_config(path, overrides)
    used = set(_INTERPOLATED.findall("\n".join([Path(path).read_text(encoding="utf-8"), *overrides])))
    kept = {key: value for key, value in values.items() if key in model.model_fields or key not in used}
    return validate(model, kept, source=str(path))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file with ``key.path=value`` overrides, which no model has looked at yet.

    Raises:
        ConfigError: a missing file, or broken YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no such configuration file: {path}")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top level")
    for override in overrides:
        _override(tree, override)
    try:
        values: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}, at {error.full_key!r}") from error
    return dict(values)


def validate(model: type[ConfigT], values: Any, source: str) -> ConfigT:
    """Validates plain values against a model; errors name `source`, the key and what to write instead."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def with_overrides(model: type[ConfigT], values: Any, overrides: Sequence[str], source: str) -> ConfigT:
    """Applies ``key.path=value`` overrides to plain values and validates the result.

    Raises:
        ConfigError: as `load_config`.
    """
    tree = OmegaConf.create(values)
    for override in overrides:
        _override(tree, override)
    return validate(model, OmegaConf.to_container(tree, resolve=True), source)


def save_config(config: Config, path: Path) -> None:
    """Writes a resolved configuration as YAML, every default spelled out."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text."""
    return str(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def differences(ours: Any, theirs: Any) -> list[str]:
    """Lines ``key: ours != theirs`` for every leaf in which two plain trees differ."""
    return [f"{key}: {our!r} != {their!r}" for key, our, their in _unlike_leaves(ours, theirs)]


def changes(before: Any, after: Any) -> list[str]:
    """The overrides ``key=value`` that turn one plain tree into another with the same keys."""
    return [f"{key}={value}" for key, _, value in _unlike_leaves(before, after)]


def _unlike_leaves(ours: Any, theirs: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values of every leaf in which two plain trees differ; None where a tree has no such key."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _unlike_leaves(ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif ours != theirs:
        yield prefix, ours, theirs


def _override(tree: Any, override: str) -> None:
    """Applies ``key.path=value`` in place; ``key.0.path`` and ``key[0].path`` reach into lists."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        # Read by OmegaConf, whose YAML takes 1e-3 as a number; ${...} is resolved later, in the whole tree.
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
        OmegaConf.update(tree, key, value, force_add=True)
    except (YAMLError, OmegaConfBaseException, LookupError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"override {override!r} cannot be applied: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _explain(model: type[Config], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "the file"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(sorted(known)) or 'none'}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{key!r} is required and not set"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        # Of a model's own validator: its message names the keys, and the input is the whole section.
        return f"{key}: {message}" if location else str(message)
    return f"{key!r}: {message} (got {problem['input']!r})"


def _keys_at(model: type[Config], location: Sequence[Any]) -> list[str]:
    """Field names of the model that a pydantic error location points into."""
    current: Any = model
    for part in location:
        current = _without_none(current)
        if _is_model(current):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
        else:  # an item of list[X], tuple[X, ...] or dict[str, X]
            items = [argument for argument in typing.get_args(current) if _is_model(_without_none(argument))]
            current = items[0] if items else None
    current = _without_none(current)
    return list(current.model_fields) if _is_model(current) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _without_none(annotation: Any) -> Any:
    """``X`` of ``X | None``; other annotations as they are."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    return next(argument for argument in typing.get_args(annotation) if argument is not type(None))
