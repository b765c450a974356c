"""A report is one file: the same bytes each time, no address in it, text that stays text, numbers that come out."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lorakit.analyse import html, plots
from lorakit.analyse.page import HeatMap, Lines, Page, Section, Tokens
from lorakit.errors import LorakitError, MissingPackage, OutputExists
from tests.browser.contrast import contrast
from tests.browser.example import HARM, figures, page


class Read(HTMLParser):
    """Elements, attributes, text outside scripts, and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag == "script":
            self.scripts.append((dict(attributes).get("type") or "", ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        elif self.cdata_elem is None:
            self.words += data


@pytest.fixture(scope="module")
def read() -> Read:
    return Read(html.render(page()))


def test_equal_pages_are_equal_bytes() -> None:
    assert html.render(page()) == html.render(page())


def test_nothing_refers_to_another_file(read: Read) -> None:
    places = [value for name, value in read.attributes if name in ("src", "href", "srcset", "action", "data", "poster")]
    assert places == ["#section-1", "#section-2", "#section-3"]
    assert read.elements.keys() & {"link", "iframe", "object", "embed", "img", "base", "form"} == set()
    assert not re.search(r"@import|url\(", html._own("report.css"))


def test_only_the_two_scripts_of_the_page_may_run_and_nothing_may_be_fetched(read: Read) -> None:
    (policy,) = [value for name, value in read.attributes if name == "content" and "default-src" in value]
    scripts = [text for kind, text in read.scripts if not kind]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert len(scripts) == 2
    assert policy.split("script-src ")[1].split() == [f"'sha256-{digest}'" for digest in hashes]
    assert "default-src 'none'" in policy and "connect-src" not in policy


def test_text_from_files_stays_text(read: Read) -> None:
    assert {name for name, _ in read.attributes if name.startswith("on")} == set()
    assert read.words.count(HARM) >= 10  # titles, facts, words, cells, tokens
    assert HARM not in "".join(text for _, text in read.scripts)


def test_every_figure_carries_its_exact_csv_and_what_is_drawn(read: Read) -> None:
    packed = [text for kind, text in read.scripts if kind == "text/plain"]
    drawn = [json.loads(text) for kind, text in read.scripts if kind == "application/json"]
    assert [gzip.decompress(base64.b64decode(text)).decode() for text in packed] == [f.csv() for f in figures()]
    assert [each["kind"] for each in drawn] == ["grids"] * 3 + ["chart"] * 3 + ["picture"] * 3 + ["grids"]


def test_paragraphs_are_apart_and_code_is_marked() -> None:
    words = "One\nparagraph.\n \nA `<command>`."
    text = html.render(Page("t", sections=[Section("s", words)]))
    assert "<p>One paragraph.</p>\n<p>A <code>&lt;command&gt;</code>.</p>" in text


def test_a_report_is_written_whole_over_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    html.write(Page("first"), path)
    html.write(Page("second \udcff"), path)  # a name whose bytes are no text
    assert "<h1>second ?</h1>" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="is a folder"):
        html.write(Page("t"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LorakitError, match="could not be written"):
        html.write(Page("t"), tmp_path / "file" / "report.html")


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingPackage, match=re.escape("pip install 'lorakit[analyse]'")):
        html.write(page(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def _heat_map(**given: object) -> HeatMap:
    panels = {"p": torch.tensor([[-1.0, 3.0]])}
    return HeatMap(**{"title": "t", "panels": panels, "value": "v", "x": "x", "y": "y"} | given)


@pytest.mark.parametrize(
    ("figure", "ends"),
    [
        (_heat_map(), (-3, 3)),  # about zero
        (_heat_map(scale=(0, 1)), (0, 1)),
        (_heat_map(panels={"a": torch.tensor([[2.0, 3.0]]), "b": torch.tensor([[torch.inf, 5.0]])}), (2, 5)),
        (_heat_map(panels={"dead": torch.zeros(1, 2)}), (0, 1)),
    ],
)
def test_one_colour_scale_holds_all_panels(figure: HeatMap, ends: tuple[float, float]) -> None:
    drawn = plots.plot(figure)
    assert (drawn["layout"]["coloraxis"]["cmin"], drawn["layout"]["coloraxis"]["cmax"]) == ends
    assert {trace["coloraxis"] for trace in drawn["data"]} == {"coloraxis"}


def test_a_legend_of_many_lines_names_six_and_the_baseline() -> None:
    lines = {f"layer {index}": [1.0, 2.0] for index in range(30)}
    figure = Lines(title="t", x="x", y="y", at=[1, 2], lines={**lines, "random": [1.0]}, dashed=["random"])
    named = [trace["name"] for trace in plots.plot(figure)["data"] if trace["showlegend"]]
    assert named == [f"layer {index}" for index in (0, 6, 12, 17, 23, 29)] + ["random"]


def test_tokens_are_coloured_by_sign_and_share_of_the_greatest() -> None:
    figure = Tokens(title="t", value="v", tokens=[("a", -1.0, ""), ("b", 2.0, ""), ("c", float("nan"), "")])
    below, above, none = plots.token_colours(figure)
    assert plots.token_range(figure) == (-2.0, 2.0)
    assert below.endswith(",0.300)") and above.endswith(",0.600)") and none.endswith(",0.000)")
    assert below.split(",")[0] != above.split(",")[0]


def test_lines_stand_out_from_light_and_from_dark() -> None:
    colours = dict(re.findall(r"(--surface): (#\w+)", html._own("report.css").split("@media")[0]))
    dark = dict(re.findall(r"(--surface): (#\w+)", html._own("report.css").split("@media")[1]))
    for hue in (*plots.HUES, plots.GREY):
        assert min(contrast(hue, colours["--surface"]), contrast(hue, dark["--surface"])) >= 3, hue
