"""A model that ships inside a Python package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lorakit.errors import MissingPackage


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """Where the files of a model are; the package itself is never imported."""

    package: str  # name to import
    files: str  # a GGUF file or a model folder inside it
    install: str  # the command that installs it

    def path(self) -> Path:
        """The file or folder.

        Raises:
            MissingPackage: the package, or the file in it, is not there; says how to install it.
        """
        spec = find_spec(self.package)
        for folder in (spec.submodule_search_locations if spec else None) or []:
            if (path := Path(folder) / self.files).exists():
                return path
        raise MissingPackage(f"this model comes in the Python package {self.package}; install it with: {self.install}")
