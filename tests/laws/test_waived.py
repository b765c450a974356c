"""Who is free of a law, and why; and what a model cannot hold is refused before anything changes."""

from __future__ import annotations

import pytest

import lorakit as lk
from lorakit.errors import LorakitError
from tests.laws.cases import CANNOT, METHODS, bits, method_named, same_bits
from tests.tiny import tiny

WAIVABLE = ("fresh", "merge", "rows")


def test_every_waiver_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """Run with `-s` to see the table."""
    with capsys.disabled():
        for name, method in METHODS.items():
            for law, why in method.waives.items():
                print(f"\n  {name:<18} {law:<6} {why}", end="")
    for name, method in METHODS.items():
        assert set(method.waives) <= set(WAIVABLE), name
        assert all(len(why.split()) > 2 for why in method.waives.values()), name


@pytest.mark.parametrize(("family", "method"), CANNOT)
def test_what_a_family_cannot_hold_is_refused_in_a_sentence(family: str, method: str) -> None:
    model = tiny(family)
    before, attributes = bits(model), set(vars(model))
    with pytest.raises(LorakitError, match=CANNOT[family, method]):
        lk.attach(model, method_named(method))
    assert same_bits(bits(model), before)
    assert set(vars(model)) == attributes
