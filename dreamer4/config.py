"""Configurations are frozen dataclasses; here they go to JSON, come back, and are compared."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from dreamer4.errors import UserError
from dreamer4.files import same_path

Config = TypeVar("Config")

ADDED = {"added": True}
"""``metadata`` of a field that runs were made without: JSON leaves it out where it has its default, as before there was
such a field, so that those runs go on."""


def to_json(config: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, paths as strings; what is left must already be JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kept = [f for f in dataclasses.fields(config) if f.metadata != ADDED or getattr(config, f.name) != f.default]
        return {f.name: to_json(getattr(config, f.name)) for f in kept}
    if isinstance(config, (tuple, list)):
        return [to_json(x) for x in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_json(kind: type[Config], value: Any, where: str = "config") -> Config:
    """The inverse of ``to_json`` for the type ``kind``; a ``UserError`` names a field that is unknown or missing."""
    return _restore(kind, value, where)


def _restore(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where}: found {value!r}, expected the fields of {getattr(kind, '__name__', kind)}")
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            raise UserError(f"{where}.{sorted(unknown)[0]}: no such field in {getattr(kind, '__name__', kind)}")
        required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        if missing := required - value.keys():
            raise UserError(f"{where}.{sorted(missing)[0]}: missing")
        make: Any = kind
        return make(**{name: _restore(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _restore(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: found {value!r}, expected a list")
        kinds = [arguments[0]] * len(value) if arguments[1:] == (Ellipsis,) else arguments
        if len(kinds) != len(value):
            raise UserError(f"{where}: found {len(value)} values, expected {len(kinds)}")
        return tuple(_restore(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if kind is Path:
        return Path(value)
    if origin is typing.Literal:
        if not any(value == a and type(value) is type(a) for a in arguments):
            raise UserError(f"{where}: found {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    expected = (int, float) if kind is float else kind
    is_kind = not isinstance(expected, (type, tuple)) or isinstance(value, expected)
    if not is_kind or (isinstance(value, bool) and kind in (int, float)):  # which Python counts among the integers
        raise UserError(f"{where}: found {value!r}, expected {kind.__name__}")
    return value


def at_least(bound: int, config: Any, *names: str) -> None:
    """Raises a ``UserError`` unless each of the named fields of ``config`` is ``bound`` or more, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise UserError(f"{name}: {value} found, {bound} or more expected")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two JSON configs differ, one line each: ``name: old value, new value``. A path is the same
    whether it is relative or absolute."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            path = f"{where}.{name}" if where else name
            lines += differences(old.get(name, "absent"), new.get(name, "absent"), path)
        return lines
    if isinstance(old, str) and isinstance(new, str) and same_path(old, new):
        return []
    return [] if old == new else [f"{where}: {old!r} there, {new!r} asked for"]
