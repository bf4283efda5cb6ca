"""Reads `tpu_configs/`: YAML into frozen dataclasses, every key and value checked."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import slm_jax
from slm_jax.errors import UserError
from slm_jax.slices.kind import Kind


def configs_folder() -> Path:
    """Where the files are: beside the package in a clone, in it where a wheel was installed."""
    package = Path(slm_jax.__file__).parent
    beside = package.parent / "tpu_configs"
    return beside if beside.is_dir() else package / "tpu_configs"


@functools.cache
def read_kinds() -> Mapping[str, Kind]:
    """Every file by its name without the ending, in the order of the alphabet.

    Raises:
        UserError: if a file is malformed.
    """
    return {path.stem: read_kind(path) for path in sorted(configs_folder().glob("*.yaml"))}


def read_kind(path: Path) -> Kind:
    """One file.

    Raises:
        UserError: if it is malformed; names the key.
    """
    try:
        return read_typed(Kind, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"tpu_configs/{path.name}: {error}") from None


def read_typed[T](cls: type[T], data: Any) -> T:
    """A dataclass from mappings, lists and scalars; nothing is converted, a list becomes a tuple.

    Raises:
        UserError: on an unknown key, a missing one, or a value of another type.
    """
    return typing.cast(T, _read(cls, data, ""))


def _read(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # always X | None here
        return None if data is None else _read(args[0], data, where)
    if origin is typing.Literal:
        if data not in args:
            raise UserError(f"{where}={data!r}: choose from {', '.join(map(str, args))}")
        return data
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read_dataclass(hint, _typed(dict, data, where), where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        found = _typed(dict, data, where)
        return {
            _typed(args[0], k, where): _read(args[1], v, _at(where, k)) for k, v in found.items()
        }
    if origin is tuple:
        return tuple(_read(args[0], v, where) for v in _typed(list, data, where))
    return float(data) if hint is float and type(data) is int else _typed(hint, data, where)


def _read_dataclass(cls: type, data: dict[Any, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            raise UserError(f"{_at(where, name)} is unknown: choose from {', '.join(hints)}")
    for f in dataclasses.fields(cls):
        if f.name not in data and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{_at(where, f.name)} is missing")
    return cls(**{name: _read(hints[name], v, _at(where, name)) for name, v in data.items()})


def _typed(cls: type, data: Any, where: str) -> Any:
    if type(data) is not cls:  # exactly: a bool is no number
        raise UserError(f"{where or 'the file'}={data!r} must be of type {cls.__name__}")
    return data


def _at(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)
