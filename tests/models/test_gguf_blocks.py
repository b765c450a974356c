"""A GGUF base that keeps its blocks computes what the converted one does, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit import train
from lorakit.core.quantised import QuantisedLinear
from lorakit.errors import BadModel
from lorakit.models import load
from tests.laws.cases import bits, output, same_bits, scramble
from tests.models import tiny_gguf
from tests.train import small

KINDS = ("Q4_0", "Q4_1", "Q8_0")
LORA = lk.LoRA(rank=4, targets="linear", init="gaussian")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tiny_gguf, "WIDTH", 64)
    monkeypatch.setattr(tiny_gguf, "HIDDEN", 96)


def file(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, floats: tuple[str, ...] = ()) -> Path:
    """A GGUF file whose matrices inside blocks are quantised, but for those with these names."""
    add = gguf.GGUFWriter.add_tensor
    number = gguf.GGMLQuantizationType[kind]

    def add_quantised(writer: Any, name: str, values: Any) -> None:
        if name.startswith("blk.") and values.ndim == 2 and not any(part in name for part in floats):
            add(writer, name, gguf.quants.quantize(values, number), raw_dtype=number)
        else:
            add(writer, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_quantised)
        return tiny_gguf.write(path)


def layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_converted_base_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(file(tmp_path / "tiny.gguf", kind, monkeypatch))
    (plain, _), (kept, _) = load(name), load(name, quantise="gguf")
    assert len(layers(kept)) == 7
    ids = torch.tensor([[5, 3, 1, 2]])
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, plain(ids).logits)
    assert {layer.packing.bits for layer in layers(kept).values()} == {{"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5}[kind]}
    half, _ = load(name, quantise="gguf", dtype=torch.bfloat16)
    assert torch.equal(half(ids).logits, load(name, dtype=torch.bfloat16)[0](ids).logits)


def test_adapters_train_over_it_merge_and_fit_the_converted_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(file(tmp_path / "tiny.gguf", "Q4_1", monkeypatch))
    model, _ = load(name, quantise="gguf")
    lk.attach(model, LORA, name="a")
    base = {key: value for key, value in bits(model).items() if ".adapters." not in key}
    examples = [small.Encoded(tuple(1 + (number + n) % 14 for n in range(6)), 2) for number in range(12)]
    steps = list(train.run(model, small.feed(examples), small.SETTINGS, name="a"))
    assert steps[-1].loss < 0.9 * steps[0].loss
    scramble(model, "a")
    ids = torch.tensor([[5, 3, 1, 2]])
    acting, before = output(model, ids), bits(model)
    lk.merge(model, "a")
    torch.testing.assert_close(output(model, ids), acting, rtol=1e-5, atol=1e-5)
    lk.unmerge(model)
    assert same_bits(bits(model), before)
    assert same_bits({key: before[key] for key in base}, base)
    lk.save(model, "a", tmp_path / "a")
    plain, _ = load(name)
    lk.load(plain, tmp_path / "a")
    assert caplog.records == []
    torch.testing.assert_close(output(plain, ids), acting, rtol=1e-5, atol=1e-5)


def test_layers_without_blocks_keep_floats_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load(str(file(tmp_path / "tiny.gguf", "Q8_0", monkeypatch, ("ffn_down",))), quantise="gguf")
    assert len(layers(model)) == 6
    assert "1 of 7 layers stay in floats" in caplog.text
    assert "down_proj" in caplog.text
    with pytest.raises(BadModel, match="no layer of LlamaForCausalLM in blocks"):
        load(str(tiny_gguf.write(tmp_path / "floats.gguf")), quantise="gguf")
    with pytest.raises(BadModel, match="type 6"):
        load(str(file(tmp_path / "five.gguf", "Q5_0", monkeypatch)), quantise="gguf")


def test_rows_in_another_order_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of q and k are: GGUF interleaves the halves that rotary positions turn."""
    written = file(tmp_path / "tiny.gguf", "Q8_0", monkeypatch)
    model, _ = load(str(written), quantise="gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(written)).tensors}
    codes = layers(model)["model.layers.0.self_attn.q_proj"].weight.view(torch.uint8).view(64, -1).numpy()
    raw = np.asarray(tensors["blk.0.attn_q.weight"].data)
    assert not np.array_equal(codes, raw)
    assert sorted(map(bytes, codes)) == sorted(map(bytes, raw))
