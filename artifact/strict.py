"""Frozen dataclasses to JSON and back, strictly: an unknown, missing or mistyped key is an error by name."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from .errors import ManifestError

T = TypeVar("T")

OMITTED_AT_DEFAULT = {"omitted_at_default": True}
"""Metadata of a dataclass field that is not written at its default, and has it where it is missing: what was written before the field
came, and every hash of it, stays as it is."""


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no white space, shortest round-trip floats (as RFC 8785 in spirit)."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: plain(own) for field, own in named if not (_may_miss(field) and own == field.default)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _may_miss(field: dataclasses.Field[Any]) -> bool:
    return field.metadata.get("omitted_at_default", False)


def decode(cls: type[T], value: Any, where: str) -> T:
    """`value` (parsed JSON) as a `cls`. Raises ManifestError naming the key below `where`."""
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: got {type(value).__name__}, expected an object with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise ManifestError(f"{where}.{key}: unknown key; known: {', '.join(fields)}. Was it made by a newer plora?")
    arguments = {}
    for name, field in fields.items():
        if name not in value and _may_miss(field):
            continue
        if name not in value:
            raise ManifestError(f"{where}.{name}: missing key")
        arguments[name] = _decode(hints[name], value[name], f"{where}.{name}")
    return cls(**arguments)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _decode_tuple(typing.get_args(hint), value, where)
    if origin is dict:
        _, item = typing.get_args(hint)
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: got {type(value).__name__}, expected an object")
        return {key: _decode(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if origin is types.UnionType:
        if value is None:
            return None
        (inner,) = [option for option in typing.get_args(hint) if option is not types.NoneType]
        return _decode(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where)
    if hint is float and type(value) in (int, float):
        return _decode_float(value, where)
    if type(value) is not hint:
        raise ManifestError(f"{where}: got {value!r} ({type(value).__name__}), expected {hint.__name__}")
    return value


def _decode_float(value: int | float, where: str) -> float:
    """JSON writes 1 for 1.0, and Python's parser reads NaN and 1e999, which no canonical form can hold."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ManifestError(f"{where}: got a number that is not finite in 64 bits")
    return number


def _decode_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ManifestError(f"{where}: got {type(value).__name__}, expected a list")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if len(value) != len(items):
        raise ManifestError(f"{where}: got {len(value)} entries, expected {len(items)}")
    return tuple(_decode(item, entry, f"{where}[{i}]") for i, (item, entry) in enumerate(zip(items, value, strict=True)))
