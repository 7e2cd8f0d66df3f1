"""Checks of a result's fields: each names the field and what it should have been. Shared by all kinds of results."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from src.vocabulary import UserError

SCHEMA_VERSION = 1
Row = TypeVar("Row")


class ResultError(UserError):
    """A result that must not be written or compared; the message names the field."""


def filled(kind: type[Row], raw: Mapping[str, Any]) -> Row:
    """A mapping -> a row of that kind with plain Python numbers, its fields not yet checked.

    Raises ResultError for another kind of result, a missing or unknown field, or another version of the schema.
    """
    if not isinstance(raw, Mapping):
        raise ResultError(f"a result is a mapping of fields, got {type(raw).__name__}")
    raw = plain(raw)
    if raw.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ResultError(f"schema_version is {raw['schema_version']!r}, this code reads {SCHEMA_VERSION}: evaluate again")
    known = {field.name: field for field in fields(kind)}
    one_of("kind", raw.get("kind", "train"), (known["kind"].default,))
    for name in raw.keys() - known.keys():
        raise ResultError(f"{name} is not a field of a result; known are {', '.join(known)}")
    for name, field in known.items():
        if name not in raw and field.default is MISSING:
            raise ResultError(f"{name} is missing")
    return kind(**raw)


def speeds(row: Any, **spreads: str) -> None:
    """Medians of a row and the fields of their quartiles. A median without them, as older results have, is nothing that could
    be judged, and is read as not measured."""
    for name, spread in spreads.items():
        if getattr(row, spread) is None:
            setattr(row, name, None)
        else:
            quartiles(spread, getattr(row, spread), getattr(row, name))


def quartiles(name: str, found: Any, median: float | None) -> None:
    """[first, third] with the median between them."""
    if not isinstance(found, list) or len(found) != 2 or median is None:
        raise ResultError(f"{name} is {found!r}, wanted [first, third] of a median of {median!r}, or null")
    low, high = (number(name, q, 0) for q in found)
    if not low <= median <= high:
        raise ResultError(f"{name} is {found}: the median, {median}, lies outside")


def number(name: str, value: Any, least: float | None = None, whole: bool = False) -> float:
    """A finite number, not below `least`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ResultError(f"{name} is {value!r}, wanted {'a whole number' if whole else 'a number'}")
    if not math.isfinite(value):
        raise ResultError(f"{name} is {value}: a result holds finite numbers only")
    if least is not None and value < least:
        raise ResultError(f"{name} is {value}, wanted at least {least}")
    return value


def text(name: str, value: Any) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ResultError(f"{name} is {value!r}, wanted a text" if value is not None else f"{name} is missing")


def mapping(name: str, value: Any, empty: bool = True) -> dict[str, Any]:
    """A mapping from names; empty: whether it may be."""
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise ResultError(f"{name} is {value!r}, wanted a mapping from names")
    if not value and not empty:
        raise ResultError(f"{name} is empty: a number carries its conditions")
    return value


def all_finite(name: str, value: Any) -> None:
    """Refuse a number anywhere inside that is not finite."""
    if isinstance(value, float):
        number(name, value)
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        all_finite(f"{name}.{key}", item)


def date(name: str, value: Any) -> None:
    """ISO 8601 in UTC."""
    try:
        if datetime.fromisoformat(value).utcoffset() == timedelta(0):
            return
    except (TypeError, ValueError):
        pass
    raise ResultError(f"{name} is {value!r}, wanted ISO 8601 in UTC, as datetime.now(UTC).isoformat(timespec='seconds')")


def one_of(name: str, value: Any, choices: tuple) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        wanted = ", ".join("null" if c is None else str(c) for c in choices)
        raise ResultError(f"{name} is {value!r}, wanted one of {wanted}")


def truth(name: str, value: Any, unknown: bool = False) -> None:
    """Refuse what is not a bool; unknown: null will do, too."""
    if not isinstance(value, bool) and not (unknown and value is None):
        raise ResultError(f"{name} is {value!r}, wanted true{', false or null' if unknown else ' or false'}")


def plain(value: Any) -> Any:
    """Numbers of numpy and torch -> Python, tuples -> lists, paths -> text; everything else as it is."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value
