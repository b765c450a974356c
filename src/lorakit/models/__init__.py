"""Models by name: packaged, local, GGUF or from the hub."""

from __future__ import annotations

from lorakit.models.cache import cache_folder
from lorakit.models.gguf import convert
from lorakit.models.loading import folder, load, writes
from lorakit.models.longest import longest

__all__ = ["cache_folder", "convert", "folder", "load", "longest", "writes"]
