"""A page as one HTML file that needs nothing else: no network and no other file.

Plotly's script is inside, once. A content security policy names the page's two scripts by their hashes and allows no
request: text of adapters and models is escaped, and even if it were not, it could neither run nor send anything.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.analyse import plots
from lorakit.analyse.page import Bars, Figure, HeatMap, Lines, Page, Section, Table, Tokens
from lorakit.core.atomic import write_files
from lorakit.errors import OutputExists

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {}"


def write(page: Page, path: str | Path) -> None:
    """Write the page as one HTML file, whole or not at all; a file that is there is replaced.

    Raises:
        OutputExists: the path is a folder.
        MissingPackage: Plotly is not installed.
        LorakitError: the place cannot be written.
    """
    path = Path(path)
    check(path)
    write_files(path.parent, {path.name: render(page).encode("utf-8", "replace")})


def check(path: str | Path) -> None:
    """Refuse, before anything is computed, what `write` would refuse at the end.

    Raises:
        OutputExists: the path is a folder.
        MissingPackage: Plotly is not installed.
    """
    if Path(path).is_dir():
        raise OutputExists(f"{path} is a folder; name a file for the report, such as {Path(path) / 'report.html'}")
    plots.plotly()


def render(page: Page) -> str:
    """The page as HTML; equal pages give equal text.

    Raises:
        MissingPackage: Plotly is not installed.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"shown": plots.shown, "numeric": plots.numeric}
    scripts = {"plotly": plots.plotly().offline.get_plotlyjs(), "script": _own("report.js")}
    own = {**scripts, "style": _own("report.css"), "policy": POLICY.format(" ".join(map(_hash, scripts.values())))}
    numbers = count(1)
    return environment.from_string(_own("report.html.j2")).render(
        **{name: Markup(text) for name, text in own.items()},
        page=page,
        sections=[_section(section, number, numbers) for number, section in enumerate(page.sections, 1)],
    )


def _section(section: Section, number: int, numbers: Iterator[int]) -> dict[str, Any]:
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", section.words) if part.strip()]
    figures = [_figure(figure, next(numbers)) for figure in section.figures]
    return {"id": f"section-{number}", "title": section.title, "paragraphs": paragraphs, "figures": figures}


def _figure(figure: Figure, number: int) -> dict[str, Any]:
    from jinja2.utils import htmlsafe_json_dumps

    packed = gzip.compress(figure.csv().encode("utf-8", "replace"), mtime=0)
    return {
        "id": f"figure-{number}",
        "number": number,
        "title": figure.title,
        "file": f"figure-{number}-{_slug(figure.title)}".rstrip("-"),
        "described": _described(figure),
        "table": figure if isinstance(figure, Table) else None,
        "tokens": _tokens(figure) if isinstance(figure, Tokens) else None,
        "drawn": htmlsafe_json_dumps(plots.plot(figure), separators=(",", ":")),
        "csv": base64.b64encode(packed).decode(),
    }


def _tokens(figure: Tokens) -> dict[str, Any]:
    tokens = [
        {"text": plots.visible(text).replace("⏎", "⏎\n"), "colour": colour, "note": _note(figure, text, value, note)}
        for (text, value, note), colour in zip(figure.tokens, plots.token_colours(figure), strict=True)
    ]
    low, high = plots.token_range(figure)
    colours = ",".join(plots.token_colour(share) for share in (low / high, 0, 1))
    return {"all": tokens, "name": figure.value, "low": low, "high": high, "colours": colours}


def _note(figure: Tokens, text: str, value: float, note: str) -> str:
    said = [f"“{plots.visible(text)}”", f"{figure.value}: {plots.shown(value)}", note]
    return " · ".join(part for part in said if part)


def _described(figure: Figure) -> str:
    """What a figure shows, in a line, for those who do not see it."""
    match figure:
        case HeatMap():
            return f"Heat map of {figure.value} by {figure.y} and {figure.x}: {', '.join(figure.panels)}"
        case Lines():
            return f"Lines of {figure.y} over {figure.x}: {', '.join(figure.lines)}"
        case Bars():
            return f"Bars of {figure.value} by {figure.label}: {', '.join(figure.bars)}"
        case Table():
            return f"Table: {figure.title}"
        case Tokens():
            return f"Text coloured by {figure.value}: {figure.title}"


def _slug(title: str) -> str:
    """The part of a title that may stand in a file's name.

    >>> _slug("Figure 3: φ of <A> and B")
    'figure-3-of-a-and-b'
    """
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))[:50]


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _own(name: str) -> str:
    return files("lorakit.analyse").joinpath(name).read_text(encoding="utf-8")
