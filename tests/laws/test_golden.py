"""Folders that older versions wrote stay readable, and mean what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel

import lorakit as lk
from lorakit.core.state import attached_to
from tests.laws.cases import close, output
from tests.tiny import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
METHOD = lk.LoRA(rank=2, targets=("attn.q", "attn.v"), ranks={"attn.v": 3}, init="gaussian", dropout=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("folder", "family"), [("format-1-llama", "llama"), ("format-1-gpt2", "gpt2")])
def test_an_old_folder_loads_as_it_was(folder: str, family: str) -> None:
    model = tiny(family)
    base = output(model)
    lk.load(model, GOLDEN / folder, "old", any_base=True)
    assert attached_to(model, "old").method == METHOD
    assert [len(lk.summary(model).adapters[0].rows), lk.summary(model).adapters[0].parameters] == [2, sizes(family)]
    theirs = PeftModel.from_pretrained(tiny(family), GOLDEN / folder).eval()
    assert close(output(model), output(theirs))
    assert not close(output(model), base, 0.01)


def sizes(family: str) -> int:
    return 2 * (2 * (32 + 32) + 3 * (32 + (16 if family == "llama" else 32)))
