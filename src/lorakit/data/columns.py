"""Which columns of the rows are read: those that the user names, or the usual ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from string import Formatter
from typing import Any

from lorakit.data.declaration import Data
from lorakit.errors import BadData, nearest


def resolved(data: Data, have: Collection[str], where: str) -> Data:
    """The declaration with the usual columns where it names none; every column that it reads is there.

    Raises:
        BadData: a column that is not there, or none that can be the target.

    Example:
        >>> resolved(Data(source="pairs.csv", target="answer"), ["context", "answer"], "pairs.csv, line 2").context
        'context'
    """
    if not (data.target or data.label or data.messages):
        data = replace(data, **_usual_target(data, have, where))
    if not (data.context or data.template or data.messages) and "context" in have:
        data = replace(data, context="context")
    if absent := [column for column in read_columns(data) if column not in have]:
        raise BadData(f"{where} has " + "; ".join(f"no column {name!r}: {nearest(name, have)}" for name in absent))
    if data.label and not (data.context or data.template):
        raise BadData(f"{where}: name the text to classify with context or template; {nearest('text', have)}")
    return data


def _usual_target(data: Data, have: Collection[str], where: str) -> dict[str, Any]:
    usual = ("label",) if data.labels else ("messages", "target")
    for name in usual:
        if name in have:
            return {name: name}
    raise BadData(
        f"{where} has no target column; name one with target, label (for classification) or messages (for chats); "
        + nearest(usual[-1], have)
    )


def read_columns(data: Data) -> list[str]:
    """Every column that the declaration reads, once.

    >>> read_columns(Data(source="x.csv", template="{q} of {who}:", target="a", group="who"))
    ['q', 'who', 'a']
    """
    named = [data.context, data.target, data.messages, data.label, data.group]
    in_template = [column for _, column in pieces(data.template or "") if column]
    return list(dict.fromkeys([*in_template, *(name for name in named if name)]))


@cache
def pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as pairs of plain text and the column that follows it.

    >>> pieces("Review: {text}\\nSentiment:")
    (('Review: ', 'text'), ('\\nSentiment:', None))
    """
    try:
        found = tuple(Formatter().parse(template))
    except ValueError as error:
        raise BadData(f"template {template!r}: {error}; write {{column}} for a field and {{{{ for a brace") from error
    if any(column == "" or form or conversion for _, column, form, conversion in found):
        raise BadData(f"template {template!r} may hold only plain {{column}} fields; write {{{{ for a brace")
    return tuple((text, column) for text, column, _, _ in found)
