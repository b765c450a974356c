"""Restaurant descriptions from facts (the E2E NLG Challenge, Novikova et al. 2017): a CSV with columns mr and ref."""

from __future__ import annotations

from lorakit.data.declaration import Data, Source
from lorakit.data.read import rows
from lorakit.errors import BadData


def source(data: Data) -> Source:
    """Describe the restaurant that a meaning representation stands for; one representation stays on one side."""
    data.refuse("subset")
    if not data.path:
        raise BadData(
            "data set 'e2e' comes from a file: give its path, a CSV with columns mr and ref (and one as test)"
        )
    usual = data.filled(template="{mr}\nDescription:", target="ref", group="mr")
    return Source(usual, rows(data.path), rows(data.test) if data.test else None)
