"""From a dataclass to flags, help and a TOML file, and back to the dataclass.

Each field is a flag of its name, dotted below the field that holds it (`--train.learning_rate`); the comment at the end
of its line is its help. A field whose metadata says `positional` is given without a flag.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorakit.core import registry
from lorakit.core.method import Method, method_called
from lorakit.errors import LorakitError, nearest
from lorakit.methods import DEFAULT

METHODS = "lorakit.methods"
METHOD = "name"  # the field that chooses the dataclass where several are possible
NAMES = tuple[str, ...]
_COMMENT = re.compile(r"^\s+(\w+): [^#\n]*#\s*(.+)$", re.MULTILINE)


def parse(kind: type, verb: str, title: str, words: Sequence[str]) -> Any:
    """Fill the dataclass `kind` from words and from the TOML file after --config; None when help was shown.

    Raises:
        LorakitError: a word, key or value that is not a field's.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    words = [_spelled_out(kind, word) for word in words]
    parser = ArgumentParser(prog=f"lorakit {verb}", description=title, exit_on_error=False, parser_mode="toml")
    parser.add_argument("--config", action="config", help="a TOML file with the same names")
    chosen = _chosen_method(words)
    for path, field, hint, kind_of in _leaves(kind, chosen):
        _add(parser, path, field, hint, help_of(kind_of).get(field.name, ""))
    if Method in _hints(kind).values():
        named = ", ".join(registry.names(METHODS))
        parser.add_argument(f"--method.{METHOD}", type=str, default=chosen.name, help=f"one of: {named}")
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return None
    try:
        found = parser.parse_args(_known(parser, words))
    except ArgumentError as error:
        raise LorakitError(_sentence(error, parser)) from error
    return _build(kind, chosen, found.as_dict())


def help_of(kind: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, its parents' included.

    >>> from lorakit.train import Train
    >>> help_of(Train)["accumulate"]
    'forward passes in one optimiser step'
    """
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        with contextlib.suppress(OSError, TypeError):
            found |= dict(_COMMENT.findall(inspect.getsource(parent)))
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fields(kind: type, chosen: type[Method]) -> Iterator[tuple[Field[Any], Any]]:
    for field in fields(kind):
        hint = _hints(kind)[field.name]
        yield field, chosen if hint is Method else hint


def _leaves(kind: type, chosen: type[Method], prefix: str = "") -> Iterator[tuple[str, Field[Any], Any, type]]:
    for field, hint in _fields(kind, chosen):
        path = f"{prefix}{field.name}"
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, chosen, f"{path}.")
        else:
            yield path, field, hint, kind


def _add(parser: Any, path: str, field: Field[Any], hint: Any, text: str) -> None:
    hint = hint | str if hint == NAMES else hint  # names may be separated by commas, too
    if field.metadata.get("positional"):
        parser.add_argument(path, type=hint, help=text, **field.metadata.get("options", {}))
    elif hint is bool:
        parser.add_argument(f"--{path}", action="store_true", help=text)
    else:
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        given = {"required": True} if default is MISSING else {"default": default}
        parser.add_argument(f"--{path}", type=hint, help=text, **given)


def _spelled_out(kind: type, word: str) -> str:
    """`--data reviews` means `--data.source reviews`, `--method lora` means `--method.name lora`."""
    head, equals, value = word.partition("=")
    for field in fields(kind):
        hint = _hints(kind)[field.name]
        if head == f"--{field.name}" and isinstance(hint, type) and is_dataclass(hint):
            first = METHOD if hint is Method else fields(hint)[0].name
            return f"{head}.{first}{equals}{value}"
    return word


def _chosen_method(words: list[str]) -> type[Method]:
    """The method that the words, or the TOML file they name, ask for."""
    name, config = _given(words, f"--method.{METHOD}"), _given(words, "--config")
    if name is None and config and Path(config).is_file():
        with contextlib.suppress(tomllib.TOMLDecodeError, AttributeError):
            name = tomllib.loads(Path(config).read_text()).get("method", {}).get(METHOD)
    return method_called(name) if name else DEFAULT


def _given(words: list[str], flag: str) -> str | None:
    joined = (word.partition("=")[2] for word in words if word.startswith(f"{flag}="))
    return next(joined, None) or next((after for word, after in pairwise(words) if word == flag), None)


def _known(parser: Any, words: list[str]) -> list[str]:
    """The words, after a check of the flags that gives the nearest name (the parser's own message does not)."""
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            raise LorakitError(f"there is no option {flag}; {nearest(flag, flags)}")
    return words


def _sentence(error: Exception, parser: Any) -> str:
    text = " ".join(str(error).split())
    return f"{text[:1].lower()}{text[1:]}; see {parser.prog} --help"


def _build(kind: type, chosen: type[Method], values: Mapping[str, Any]) -> Any:
    given: dict[str, Any] = {}
    for field, hint in _fields(kind, chosen):
        value = values.get(field.name)
        if is_dataclass(hint) and isinstance(hint, type):
            given[field.name] = _build(hint, chosen, value or {})
        elif field.name in values:
            value = value.split(",") if hint == NAMES and isinstance(value, str) else value
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)
