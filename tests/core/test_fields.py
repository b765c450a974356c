"""A method's fields are checked by their types where it is written, so that its file can be read again."""

from __future__ import annotations

from typing import Any

import pytest

import lorakit as lk
from lorakit.core.method import Method
from lorakit.errors import BadMethod
from tests.tiny import tiny

MISTYPED: dict[str, tuple[type[Method], dict[str, Any], str]] = {
    "bool": (lk.LoRA, dict(rank=True), "rank=True must be a whole number of 32 bits$"),
    "text": (lk.LoRA, dict(rank="8"), "rank='8' must be a whole number of 32 bits$"),
    "fraction": (lk.Bottleneck, dict(size=8.0), "size=8.0 must be a whole number of 32 bits$"),
    "nan": (lk.LoRA, dict(alpha=float("nan")), "alpha=nan must be a finite number of 32 bits$"),
    "dropout": (lk.VeRA, dict(dropout="x"), "dropout='x' must be a finite number of 32 bits$"),
    "factor": (lk.LoKr, dict(factor="a"), "factor='a' must be a whole number of 32 bits$"),
    "ranks": (lk.LoRA, dict(ranks=[1]), r"ranks=\[1\] must be a mapping with a whole number of 32 bits for each name$"),
    "names": (lk.LoRA, dict(targets=5), "targets=5 must be a list, each a text, or a text$"),
    "none": (lk.LoRA, dict(train=None), "train=None must be a list, each a text, or a text$"),
    "numbers": (lk.LoRA, dict(targets=[1]), r"targets=\[1\] must be a list, each a text, or a text$"),
    "seed": (lk.VeRA, dict(seed=2**40), "must be a whole number of 32 bits$"),
    "flag": (lk.DyLoRA, dict(frozen=1), "frozen=1 must be True or False$"),
    "word": (lk.DyLoRA, dict(distribution="normal"), "must be one of uniform, geometric$"),
    "two": (lk.LoRA, dict(rank="8", dropout=None), "dropout=None must be .*; |rank='8' must be .*; "),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_a_value_of_another_type_is_a_sentence(case: str) -> None:
    kind, fields, sentence = MISTYPED[case]
    with pytest.raises(BadMethod, match=f"{kind.__name__} cannot be built so: .*({sentence})"):
        kind(**fields)


@pytest.mark.parametrize("given", ["lora", lk.LoRA, None, {"rank": 8}])
def test_what_is_no_method_is_a_sentence(given: Any) -> None:
    model = tiny("gpt2")
    before = set(vars(model))
    with pytest.raises(BadMethod, match=r"attach takes a model and a method, as in attach\(model, LoRA\(rank=8\)\)"):
        lk.attach(model, given)
    assert set(vars(model)) == before
    with pytest.raises(BadMethod, match="not 'no model'"):
        lk.attach("no model", lk.LoRA())  # type: ignore[arg-type]
