"""A real browser, Debian's chromium: named by CHROMIUM or found on the path; in CI it has to be there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.analyse import html
from tests.browser.example import page as example


def _missing(what: str) -> None:
    reason = f"the report's tests need {what}: apt-get install chromium; pip install playwright"
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless browser for all tests of a file."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        _missing("chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a written report."""
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    html.write(example(), path)
    return path.as_uri()
