"""Every Python example of the README and of the docs runs, and every page is in the navigation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.source import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGED = ("smollm2-135m", "minilm-l6")  # a page that loads one of these takes a while


def examples(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def _case(page: Path) -> object:
    slow = any(name in block for block in examples(page) for name in PACKAGED)
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("page", [_case(page) for page in PAGES if examples(page)])
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(examples(page), start=1):
        exec(compile(block, f"{page.name}, example {number}", "exec"), namespace)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert [page for page in pages if page not in navigation] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
