"""Find methods, initialisations, families, tasks and verbs by the names of their files.

A file in a registered folder *is* the registration; no list is kept by hand.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from lorakit.errors import UnknownName, nearest


@cache
def names(package: str) -> tuple[str, ...]:
    """Names of the files in `package`, with dashes for underscores.

    >>> "lora" in names("lorakit.methods")
    True
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(info.name.replace("_", "-") for info in found if not info.name.startswith("_")))


def find(package: str, name: str) -> ModuleType:
    """Import the file called `name` (dashes or underscores) from `package`.

    Raises:
        UnknownName: no such file; the message gives the nearest names and all there are.
    """
    wanted = name.replace("_", "-")
    if wanted not in names(package):
        kind = package.rsplit(".", 1)[-1]
        raise UnknownName(f"there is nothing called {name!r} in {kind}; {nearest(wanted, names(package))}")
    return importlib.import_module(f"{package}.{wanted.replace('-', '_')}")
