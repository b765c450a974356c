"""Small JSON files that somebody may have cut or changed."""

from __future__ import annotations

import json
from typing import Any

from lorakit.errors import LorakitError


def parsed(content: str | bytes, where: object, advice: str) -> dict[str, Any]:
    """The JSON object that stands in a file, or in a line of one.

    Args:
        content: what was read.
        where: what it is called in the sentence.
        advice: what to do where it is damaged.

    Raises:
        LorakitError: it is no JSON object.

    >>> parsed('{"step": 3', "metrics.jsonl, line 3,", "remove that line")
    Traceback (most recent call last):
    lorakit.errors.LorakitError: metrics.jsonl, line 3, is damaged (no JSON object); remove that line
    """
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LorakitError(f"{where} is damaged (no JSON object); {advice}")
    return found
