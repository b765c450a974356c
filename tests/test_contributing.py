"""The method that CONTRIBUTING.md shows is a whole method: it is put into a file, and the laws hold for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lorakit as lk
import lorakit.methods
from lorakit.cli import main
from lorakit.core import registry
from lorakit.core.method import Method, method_called
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.reproduce.test_run import declared
from tests.source import ROOT
from tests.test_docs import BLOCK
from tests.tiny import tiny, tokens

__all__ = ["declared"]


@pytest.fixture
def gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    (block,) = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len([line for line in block.splitlines() if line.strip()]) <= 30
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "gain.py").write_text(block)
    monkeypatch.setattr(lorakit.methods, "__path__", [*lorakit.methods.__path__, str(tmp_path / "methods")])
    registry.names.cache_clear()
    yield method_called("gain")()
    registry.names.cache_clear()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_one_file_is_a_method(gain: Method, family: str, tmp_path: Path) -> None:
    model = tiny(family)
    base, before = output(model), bits(model)
    lk.attach(model, gain, name="a")
    assert torch.equal(output(model), base)
    scramble(model, "a")
    attached = output(model)
    assert not close(attached, base, 0.01)
    lk.merge(model, "a")
    assert close(output(model), attached)
    lk.unmerge(model)
    lk.save(model, "a", tmp_path / "a")
    again = tiny(family)
    lk.load(again, tmp_path / "a")
    assert torch.equal(output(again), attached)
    ids = tokens(model)
    with lk.use(model, ["a", None, "a"]):
        assert close(output(model, ids)[1], base[1]) and close(output(model, ids)[2], attached[2])
    lk.detach(model, "a")
    assert same_bits(bits(model), before)


def test_it_trains_from_the_command_line(gain: Method, declared, tmp_path: Path, capsys) -> None:
    data = ["--data", declared.data.source, "--data.context", "text", "--data.label", "verdict"]
    method = ["--method", "gain", "--method.targets", "attn.v"]
    out = tmp_path / "out-gain"
    assert main(["train", "--base", declared.base, *data, *method, "--train.steps", "2", "--out", str(out)]) == 0
    assert main(["eval", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out
