"""Configurations are frozen dataclasses; here they go to JSON, come back, and are compared."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from dreamer4.errors import UserError
from dreamer4.files import same_path

Config = TypeVar("Config")

ADDED = {"added": True}
"""``metadata`` of a field that runs were made without: JSON leaves it out where it has its default, as before there was
such a field, so that those runs go on."""

Precision = Literal["float32", "bfloat16"]
"""What layers compute in; parameters, losses and optimizers are float32 in either."""


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


def leaves(config: Any, where: str = "") -> dict[str, Any]:
    """The values of a configuration by their dotted paths; a dataclass is one path for each of its fields."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return {where: config}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        found |= leaves(getattr(config, field.name), f"{where}.{field.name}" if where else field.name)
    return found


def unread(config: Any, where: str = "") -> dict[str, str]:
    """What nothing reads as ``config`` stands, and while what holds: ``{dotted path: condition}``.

    A dataclass says so of its fields, or of fields of its parts, by a method ``unread`` without arguments.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return {}
    prefix, of_its_own = f"{where}." if where else "", getattr(config, "unread", dict)
    found = {prefix + path: condition for path, condition in of_its_own().items()}
    for field in dataclasses.fields(config):
        found |= unread(getattr(config, field.name), prefix + field.name)
    return found


def refuse_unread(config: Any, default: Any, conditions: Mapping[str, str] | None = None) -> None:
    """Raises a ``UserError`` for a value of ``config`` that differs from that of ``default`` and that nothing reads.

    ``default`` is what the user has started from, a preset: what is unread there and left alone misleads nobody.
    ``conditions`` are those of ``unread(config)`` if not given; a path stands for all that lies under it.
    """
    conditions = unread(config) if conditions is None else conditions
    before = leaves(default)
    for path, value in leaves(config).items():
        if path in before and before[path] == value:
            continue
        parts = path.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if covering := next((name for name in above if name in conditions), None):
            raise UserError(f"{path}: {_shown(value)} found, but nothing reads it while {conditions[covering]}")


def with_precision(config: Config) -> Config:
    """``config`` with its ``precision``, where that is given, in place of every ``dtype`` in it, and then None itself:
    a run is bound to what its layers compute in, however that was said."""
    made: Any = config
    return config if made.precision is None else dataclasses.replace(_with_dtype(made, made.precision), precision=None)


def unread_precisions(config: Any) -> dict[str, str]:
    """What nothing reads of a configuration whose ``precision`` is given: every ``dtype`` in it."""
    if config.precision is None:
        return {}
    return {path: "precision is given" for path in leaves(config) if path.endswith(".dtype")}


def _with_dtype(config: Any, dtype: Precision) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(
        config, **{n: dtype if n == "dtype" else _with_dtype(x, dtype) for n, x in parts.items()}
    )


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_path(text: str) -> bool:
    return "/" in text or os.sep in text


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two JSON configs differ, one line each: ``name: old value, new value``. A path is the same
    whether it is relative or absolute."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            path = f"{where}.{name}" if where else name
            lines += differences(old.get(name, "absent"), new.get(name, "absent"), path)
        return lines
    if isinstance(old, str) and isinstance(new, str) and any(map(_is_path, (old, new))) and same_path(old, new):
        return []
    return [] if old == new else [f"{where}: {old!r} there, {new!r} asked for"]
