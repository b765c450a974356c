"""Rows of a file, one at a time: CSV, TSV, JSONL and Parquet.

A row that cannot be read is not skipped: it comes out with its place and its fault.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lorakit.errors import BadData, MissingPackage, nearest

LONGEST_CELL = 2**31 - 1  # characters; the most that every platform takes


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place ("pairs.csv, line 3"), its cells by column, and what is wrong with it, if anything."""

    place: str
    cells: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


def rows(path: str | Path) -> Iterator[Row]:
    """Read a file row by row; its extension says how. Memory holds one row (of Parquet: one batch) at a time.

    Raises:
        BadData: there is no such file, its kind is unknown, or it is broken beyond a single row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*") if file.suffix.lower() in READERS]
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise BadData(f"{path} {what}; data files beside it: {nearest(path.name, beside)}")
    if path.suffix.lower() not in READERS:
        raise BadData(f"{path} is of no kind that can be read; convert it to one of {', '.join(sorted(READERS))}")
    return READERS[path.suffix.lower()](path)


def _open(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become lone surrogates, so that they are reported where they stand."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(f"{path}, line {number}", line)


def _json_row(place: str, line: str) -> Row:
    try:
        cells = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return Row(place, fault=f"is not JSON: {error.msg} at character {error.colno}")
    except (RecursionError, ValueError) as error:
        return Row(place, fault=f"is not JSON that can be read: {error}")
    if not isinstance(cells, dict):
        return Row(place, fault=f"holds {type(cells).__name__}, not an object with columns as keys")
    return Row(place, cells) if is_text("".join(cells)) else Row(place, fault="has a key that is not UTF-8")


def _comma_rows(path: Path) -> Iterator[Row]:
    return _table_rows(path, ",")


def _tab_rows(path: Path) -> Iterator[Row]:
    return _table_rows(path, "\t")


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)  # 131,072 unless told
    with _open(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        try:
            for cells in reader:
                place, line = f"{path}, line {line}", reader.line_num + 1
                if not cells:
                    continue
                if header:
                    yield _table_row(place, header, cells)
                else:
                    header = _header(place, cells)
        except csv.Error as error:
            raise BadData(f"{path}, line {line}: cannot be read: {error}; check the quotes there") from error


def _header(place: str, columns: list[str]) -> list[str]:
    if not is_text("".join(columns)):
        raise BadData(f"{place}: the header is not UTF-8; save the file as UTF-8")
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise BadData(f"{place}: these columns stand twice in the header: {', '.join(map(repr, twice))}")
    return columns


def _table_row(place: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) < len(header):
        return Row(place, fault=f"ends before column {header[len(cells)]!r}")
    if len(cells) > len(header):
        return Row(place, fault=f"goes on after column {header[-1]!r}, the last: {len(cells)} cells")
    return Row(place, dict(zip(header, cells, strict=True)))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(f"reading {path} needs pyarrow; install it with: pip install 'lorakit[data]'") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", cells)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadData(f"{path}, after row {number}: cannot be read as Parquet: {error}") from error


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: what was not UTF-8 in a file cannot.

    >>> is_text("é"), is_text(b"\\xe9".decode("utf-8", "surrogateescape"))
    (True, False)
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _comma_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
    ".tsv": _tab_rows,
}
