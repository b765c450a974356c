"""The command line: one file a verb, found by its name; every option is a field of a dataclass."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from lorakit.core import registry
from lorakit.errors import LorakitError, nearest
from lorakit.version import VERSION

PACKAGE = "lorakit.cli"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a user's error is one sentence and exit code 2, with a traceback only under --debug."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return _run(words)
    except LorakitError as error:
        if debug:
            raise
        print(f"lorakit: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("lorakit: stopped", file=sys.stderr)
    return 2


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(VERSION)
        return 0
    if words[0] not in registry.names(PACKAGE):
        raise LorakitError(f"there is no verb {words[0]!r}; {nearest(words[0], registry.names(PACKAGE))}")
    from lorakit.cli import _declare

    verb = registry.find(PACKAGE, words[0])
    options = _declare.parse(verb.Options, words[0], (verb.__doc__ or "").splitlines()[0], words[1:])
    return 0 if options is None else verb.main(options) or 0


def _overview() -> str:
    verbs = {name: (registry.find(PACKAGE, name).__doc__ or "").splitlines()[0] for name in registry.names(PACKAGE)}
    listed = "\n".join(f"  {name:<10} {line}" for name, line in verbs.items())
    title = f"lorakit {VERSION}: adapt a frozen transformer with a few trained numbers"
    return f"{title}\n\n{listed}\n\nlorakit VERB --help tells a verb's options"
