"""What `lorakit.analyse` gives is listed once, documented, and in the reference."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lorakit import analyse

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


@pytest.mark.parametrize("name", analyse.__all__)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^::: lorakit\.analyse\.{name}$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    own = getattr(analyse, name)
    assert (not inspect.isroutine(own) and not inspect.isclass(own)) or (own.__doc__ or "").strip()
