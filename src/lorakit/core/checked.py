"""Check values, of a file or given by hand, against the types that a declaration wants, before use is made of them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST_INT, LARGEST_FLOAT = 2**31, 1e38
_WORDS = {
    int: "a whole number of 32 bits",
    float: "a finite number of 32 bits",
    bool: "True or False",
    str: "a text",
}


def misfits(
    told: object, wanted: Mapping[str, Any], what: str, *, required: Iterable[str] = (), closed: bool = False
) -> list[str]:
    """What is wrong with a JSON object whose entries should have the types `wanted`; `closed` allows no others.

    >>> misfits({"rank": "8"}, {"rank": int, "alpha": float}, "the method", required=["alpha"])
    ['the method has no alpha', "the method has a bad rank: '8'"]
    """
    if not isinstance(told, dict):
        return [f"{what} is not a JSON object"]
    faults = [f"{what} has no {key}" for key in required if key not in told]
    faults += [f"{what} has an unknown entry {key!r}" for key in told if closed and key not in wanted]
    bad = {key: value for key, value in told.items() if key in wanted and not fits(value, wanted[key])}
    return faults + [f"{what} has a bad {key}: {reprlib.repr(value)}" for key, value in bad.items()]


@cache
def types_of(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the type `hint`, or is its JSON: numbers are finite, tuples and records may be lists.

    >>> fits([1, 2], tuple[int, ...]), fits(True, int), fits(float("nan"), float)
    (True, False, False)
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(each, parts[0]) for each in value)
    if origin is not None:
        return isinstance(value, Mapping) and all(fits(each, parts[1]) for each in value.values())
    if is_dataclass(hint) and isinstance(hint, type):
        types = types_of(hint).values()
        return isinstance(value, list) and len(value) == len(types) and all(map(fits, value, types))
    if hint in (int, float):
        most = LARGEST_INT if hint is int else LARGEST_FLOAT
        return isinstance(value, int | hint) and not isinstance(value, bool) and -most <= value <= most  # not so of NaN
    return hint is Any or isinstance(value, hint)


def described(hint: Any) -> str:
    """A type in words.

    >>> described(dict[str, bool]), described(Literal["none", "all"]), described(tuple[str, ...] | str)
    ('a mapping with True or False for each name', 'one of none, all', 'a list, each a text, or a text')
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return ", or ".join(described(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple):
        return "a list" if parts[0] is Any else f"a list, each {described(parts[0])}"
    if origin is not None:
        return f"a mapping with {described(parts[1])} for each name"
    return _WORDS.get(hint, str(getattr(hint, "__name__", hint)))
