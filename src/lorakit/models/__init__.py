"""Models by name: packaged, local, GGUF or from the hub."""

from __future__ import annotations

from lorakit.models.adopt import adopt
from lorakit.models.cache import cache_folder
from lorakit.models.gguf import convert
from lorakit.models.loading import folder, gguf_file, load, writes
from lorakit.models.longest import longest
from lorakit.models.quantise import Quantise, dequantise, quantise

__all__ = [
    "Quantise",
    "adopt",
    "cache_folder",
    "convert",
    "dequantise",
    "folder",
    "gguf_file",
    "load",
    "longest",
    "quantise",
    "writes",
]
