"""Configurations as JSON and back: frozen dataclasses, each with its class named."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from slm_jax.errors import UserError


def to_json(value: Any) -> Any:
    """A dataclass tree as JSON types; every dataclass carries its class name under `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json[T](cls: type[T], data: Any) -> T:
    """Builds `cls` from the output of `to_json`. Only classes named in annotations are made.

    Raises:
        UserError: on an unknown or missing field, or a class that the annotation does not allow.
    """
    return typing.cast(T, _build(cls, data, cls.__name__))


def _build(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        choices = [a for a in args if a is not type(None)]
        if isinstance(data, dict):
            named = [a for a in choices if getattr(a, "__name__", None) == data.get("type")]
            if not named:
                known = ", ".join(getattr(a, "__name__", str(a)) for a in choices)
                raise UserError(f"{where}: type={data.get('type')!r} is not one of {known}")
            return _build(named[0], data, where)
        return _build(choices[0], data, where) if len(choices) == 1 else data
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
        return tuple(
            _build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True))
        )
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(data, dict) or data.get("type") != hint.__name__:
            raise UserError(f"{where}: {str(data)[:60]} is not a {hint.__name__}")
        hints = typing.get_type_hints(hint)
        values = {k: v for k, v in data.items() if k != "type"}
        unknown = sorted(set(values) - set(hints))
        required = [f.name for f in dataclasses.fields(hint) if _required(f)]
        missing = [name for name in required if name not in values]
        if missing:
            raise UserError(f"{where}: field {missing[0]!r} of {hint.__name__} is missing")
        if unknown:
            raise UserError(
                f"{where}: field {unknown[0]!r} is unknown to {hint.__name__}: the file was "
                "written by another version of slm_jax"
            )
        return hint(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in values.items()})
    return Path(data) if hint is Path else data


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def differences(saved: Any, given: Any, where: str = "") -> list[str]:
    """Where two `to_json` trees differ, as `model.d_model: saved 64, given 128`."""
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = list(dict.fromkeys([*saved, *given]))
        return [
            d
            for k in keys
            for d in differences(saved.get(k), given.get(k), f"{where}.{k}" if where else k)
        ]
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        return [
            d
            for i, (a, b) in enumerate(zip(saved, given, strict=True))
            for d in differences(a, b, f"{where}.{i}")
        ]
    return [] if saved == given else [f"{where}: saved {saved}, given {given}"]
