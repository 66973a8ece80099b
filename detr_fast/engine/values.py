"""Values of settings: from the text of a command line or the plain values of a file to a type, and back to text."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from detr_fast.engine.errors import ConfigError

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


def convert(value: Any, kind: Any, key: str) -> Any:
    """``value``, or the value that its text says, as ``kind``; lists are comma separated."""
    fault = ConfigError(f"{key} must be {name_of_type(kind)}, got {value!r}")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        text = str(value)
        if text not in arguments:
            nearest = difflib.get_close_matches(text, arguments, n=1)
            raise ConfigError(f"{fault}; did you mean {nearest[0]}?" if nearest else str(fault))
        return text
    if origin in (tuple, list):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            items = [items]
        try:
            return tuple(convert(item, arguments[0], key) for item in items if item != "")
        except ConfigError:
            raise fault from None
    if origin in (types.UnionType, typing.Union):
        return _union(value, arguments, key, fault)
    return _plain_value(value, kind, fault)


def _union(value: Any, kinds: Sequence[Any], key: str, fault: ConfigError) -> Any:
    if type(None) in kinds and (value is None or str(value).lower() == "none"):
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return convert(value, kind, key)
            except ConfigError:
                continue
    raise fault


def _plain_value(value: Any, kind: Any, fault: ConfigError) -> Any:
    if kind is bool:
        word = str(value).lower()
        if word not in TRUE_WORDS + FALSE_WORDS:
            raise fault
        return word in TRUE_WORDS
    if isinstance(value, bool) or value is None:
        raise fault
    if kind is int and isinstance(value, float):
        raise fault
    if kind is str:
        if not isinstance(value, str):
            raise fault
        return value
    try:
        number = kind(value)
    except (TypeError, ValueError):
        raise fault from None
    if isinstance(number, float) and not math.isfinite(number):
        raise fault
    return number


def name_of_type(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(arguments)
    if origin in (tuple, list):
        return f"{name_of_type(arguments[0]).split()[-1]}s separated by commas"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(name_of_type(argument) for argument in arguments)
    names = {int: "an integer", float: "a number", bool: "true|false", str: "text", type(None): "none"}
    return names.get(kind, str(kind))


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
