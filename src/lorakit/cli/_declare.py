"""From a dataclass to flags, help and a TOML file, and back to the dataclass.

Each field is a flag of its name, dotted below the field that holds it (`--train.learning_rate`); the comment at the end
of its line is its help. A field whose metadata says `positional` is given without a flag; one whose metadata names a
dataclass that it `overrides` has that dataclass's flags and holds those that were given. A TOML file is read as the
flags that say the same.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any

from lorakit.core.checked import described
from lorakit.core.method import Method, method_names, named
from lorakit.errors import LorakitError, nearest
from lorakit.methods import DEFAULT

OVERRIDES = "overrides"  # of a field's metadata: the dataclass whose given values it holds
METHOD = "name"  # the field that chooses the dataclass where several are possible
NAMES = tuple[str, ...]
_REFUSED = re.compile(
    r'(?:Parser key "|argument --|(?P<missing>the following arguments are required: ))(?P<path>[\w.]+)'
)
_COMMENT = re.compile(r"^\s+(\w+): [^#\n]*#\s*(.+)$", re.MULTILINE)


def parse(kind: type, verb: str, title: str, words: Sequence[str]) -> Any:
    """Fill the dataclass `kind` from the TOML file after --config and from words, which win; None: help was shown.

    Raises:
        LorakitError: a word, key or value that is not a field's.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    words = [_spelled_out(kind, word) for word in [*_in_file(kind, words), *words]]
    parser = ArgumentParser(prog=f"lorakit {verb}", description=title, exit_on_error=False, parser_mode="toml")
    parser.add_argument("--config", type=str, help="a TOML file with the same names")
    name = _given(words, f"--method.{METHOD}") or DEFAULT.name
    chosen, preset = named(name)
    leaves = dict(_leaves(kind, chosen))
    for path, leaf in leaves.items():
        _add(parser, path, leaf)
    if Method in _hints(kind).values():
        have = ", ".join(sorted(method_names()))
        parser.add_argument(f"--method.{METHOD}", type=str, default=name, help=f"one of: {have}")
        parser.set_defaults({f"method.{field}": value for field, value in preset.items()})
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return None
    try:
        found = parser.parse_args(_known(parser, words))
    except ArgumentError as error:
        raise LorakitError(f"{_sentence(error, leaves, words)}; see {parser.prog} --help") from error
    return kind(**_values(kind, chosen, found.as_dict()))


def help_of(kind: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, its parents' included.

    >>> from lorakit.train import Train
    >>> help_of(Train)["accumulate"]
    'batches in one optimiser step'
    """
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        with contextlib.suppress(OSError, TypeError):
            found |= dict(_COMMENT.findall(inspect.getsource(parent)))
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fields(kind: type, chosen: type[Method] | None = None) -> Iterator[tuple[Field[Any], Any]]:
    for field in fields(kind):
        hint = field.metadata.get(OVERRIDES) or _hints(kind)[field.name]
        yield field, chosen if chosen and hint is Method else hint


def _flag(field: Field[Any]) -> str:
    """What a field's flag is called: its name, without the underscore that keeps it from being a word of Python's."""
    return field.name.removesuffix("_")


def _is_part(hint: Any) -> bool:
    """Whether a field of this type holds a dataclass, and so stands for that dataclass's flags."""
    return isinstance(hint, type) and is_dataclass(hint)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A field that is one flag."""

    field: Field[Any]
    hint: Any
    text: str
    optional: bool  # whether its default is not to be seen: it says what was given, and nothing else


def _leaves(
    kind: type, chosen: type[Method], prefix: str = "", *, optional: bool = False
) -> Iterator[tuple[str, _Leaf]]:
    texts = help_of(kind)
    for field, hint in _fields(kind, chosen):
        path = f"{prefix}{_flag(field)}"
        if _is_part(hint):
            yield from _leaves(hint, chosen, f"{path}.", optional=optional or OVERRIDES in field.metadata)
        else:
            yield path, _Leaf(field, hint, texts.get(field.name, ""), optional)


def _add(parser: Any, path: str, leaf: _Leaf) -> None:
    field, text = leaf.field, leaf.text
    hint = leaf.hint | str if leaf.hint == NAMES else leaf.hint  # names may be separated by commas, too
    if field.metadata.get("positional"):
        several = {"type": str, "nargs": "+"} if leaf.hint == NAMES else {"type": hint}
        parser.add_argument(path, help=text, **several)
    elif hint is bool and leaf.field.default is not True:  # one that holds unless told otherwise takes a value
        parser.add_argument(f"--{path}", action="store_true", help=text)
    else:
        parser.add_argument(f"--{path}", type=hint, help=text, **_default(leaf))


def _default(leaf: _Leaf) -> dict[str, Any]:
    if leaf.optional:
        return {"default": argparse.SUPPRESS}
    factory = leaf.field.default_factory
    default = leaf.field.default if factory is MISSING else factory()
    return {"required": True} if default is MISSING else {"default": default}


def _in_file(kind: type, words: Sequence[str]) -> Iterator[str]:
    """What the TOML file after --config says, as words.

    Raises:
        LorakitError: a file that cannot be read, or is no TOML.
    """
    path = _given(words, "--config")
    if not path:
        return
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LorakitError(f"the file {path} of --config cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LorakitError(f"the file {path} of --config is not TOML in UTF-8: {error}") from error
    yield from _said(kind, table)


def _said(kind: type, table: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    parts = {field.name: hint for field, hint in _fields(kind) if _is_part(hint)}
    for key, value in table.items():
        if isinstance(value, dict) and key in parts:
            yield from _said(parts[key], value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def _spelled_out(kind: type, word: str) -> str:
    """`--data reviews` means `--data.source reviews`, `--method lora` `--method.name lora`, `--dry-run` `--dry_run`.

    And -o means --out, for every verb that has it.
    """
    word = word.replace("-o", "--out", 1) if re.match(r"-o(=|$)", word) else word
    head, equals, value = word.partition("=")
    if head.startswith("--"):
        head = "--" + head[2:].replace("-", "_")
    for field, hint in _fields(kind):
        if head == f"--{field.name}" and _is_part(hint):
            first = METHOD if hint is Method else fields(hint)[0].name
            return f"{head}.{first}{equals}{value}"
    return f"{head}{equals}{value}"


def _given(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag."""
    found = None
    for word, after in pairwise([*words, ""]):
        head, equals, value = word.partition("=")
        if head == flag:
            found = value if equals else after
    return found


def _known(parser: Any, words: Sequence[str]) -> list[str]:
    """The words, after a check of the flags that gives the nearest name (the parser's own message does not).

    A switch may have its value spelled out, as in a file: `--json=true`.
    """
    is_switch = {flag: action.nargs == 0 for action in parser._actions for flag in action.option_strings}
    known: list[str] = []
    for word in words:
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag not in is_switch:
            raise LorakitError(f"there is no option {flag}; {nearest(flag, is_switch)}")
        switch = word if word in ("true", "false") and is_switch.get(known[-1] if known else "") else ""
        if switch:  # --json false
            flag, value = known.pop(), switch
        if is_switch.get(flag) and value in ("true", "false"):
            known = [other for other in known if other != flag] + ([flag] if value == "true" else [])
            parser.set_defaults({flag.removeprefix("--"): False})
        else:
            known.append(word)
    return known


def _sentence(error: Exception, leaves: Mapping[str, _Leaf], words: Sequence[str]) -> str:
    """What the parser refused, in our words where it speaks of an option."""
    text = " ".join(str(error).split())
    told = _REFUSED.match(text)
    leaf = leaves.get(told["path"]) if told else None
    if not told or not leaf:
        return f"{text[:1].lower()}{text[1:]}"
    flag = told["path"] if leaf.field.metadata.get("positional") else f"--{told['path']}"
    if told["missing"] or text.endswith(": expected one argument"):
        return f"{flag} is not given: {leaf.text}"
    return f"{flag} must be {_wanted(leaf.hint)}, not {_given(words, flag)!r}"


def _wanted(hint: Any) -> str:
    """A type in words, as it is written on the command line.

    >>> _wanted(bool | None), _wanted(tuple[str, ...])
    ('True or False', 'names, separated by commas')
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return "names, separated by commas"
    if origin is Mapping:
        return f'{_wanted(inner[1])} by name, such as {{"attn.q": 4}}'
    if origin in (typing.Union, UnionType):
        return " or ".join(_wanted(each) for each in inner if each is not type(None))
    return {int: "a whole number", float: "a number"}.get(hint) or described(hint)  # what has bounds checks them itself


def words_of(kind: type, values: Mapping[str, Any]) -> list[str]:
    """The flags that give the fields of `kind` these values, but for those that are defaults.

    >>> from lorakit.train import Train
    >>> words_of(Train, {"steps": 3, "epochs": 1.0})
    ['--steps=3']
    """
    return [word for field in fields(kind) if field.name in values for word in _words(field, values[field.name])]


def _words(field: Field[Any], value: Any, prefix: str = "--") -> Iterator[str]:
    """A field's value as flags, where it is not the default; the parts of a part each by itself."""
    path, default = f"{prefix}{_flag(field)}", field.default
    if is_dataclass(value):
        told = value.to_json() if isinstance(value, Method) else vars(value)
        if isinstance(value, Method):
            yield word(f"{path}.{METHOD}", value.name)
        for each in fields(value):
            yield from _words(each, told[each.name], f"{path}.")
    elif value != (default if field.default_factory is MISSING else field.default_factory()):
        yield word(path, value)


def word(path: str, value: Any) -> str:
    """A flag with its value, as in a TOML file."""
    return f"{path}={value if isinstance(value, str) else json.dumps(value)}"


def _values(kind: type, chosen: type[Method], found: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields, out of what the parser found."""
    given: dict[str, Any] = {}
    for field, hint in _fields(kind, chosen):
        value = found.get(_flag(field))
        if _is_part(hint):
            below = _values(hint, chosen, value or {})
            given[field.name] = below if OVERRIDES in field.metadata else hint(**below)
        elif _flag(field) in found:
            value = value.split(",") if hint == NAMES and isinstance(value, str) else value
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return given
