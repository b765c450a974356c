"""Data sets: rows of a file, of the hub or of a built-in task become examples, token ids and batches."""

from __future__ import annotations

from lorakit.data.batches import Batch, collate, order
from lorakit.data.declaration import Data
from lorakit.data.examples import Dataset, Example
from lorakit.data.opening import open_data
from lorakit.data.read import rows
from lorakit.data.tokens import Encoded, TooShort, encode, encode_texts

__all__ = [
    "Batch",
    "Data",
    "Dataset",
    "Encoded",
    "Example",
    "TooShort",
    "collate",
    "encode",
    "encode_texts",
    "open_data",
    "order",
    "rows",
]
