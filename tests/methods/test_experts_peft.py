"""Adapters on stacked experts in files: PEFT's `target_parameters` both ways, our own folder, and merging on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.core.header import with_header
from lorakit.core.state import adapter_tensors, attached_to
from lorakit.errors import BadAdapterFile, BadModel
from lorakit.interop.merged import merge_checkpoint
from tests.laws.cases import close, output, scramble
from tests.tiny import tiny

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
FILE = "adapter_model.safetensors"
PLACE = "base_model.model.model.layers.0.mlp.experts"
every_family = pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])


def written(folder: Path, family: str = "mixtral", **fields: Any) -> torch.Tensor:
    """Save a trained-looking adapter on experts, and give its output."""
    model = tiny(family)
    lk.attach(model, lk.LoRA(**{"rank": 2, "targets": "mlp.gate_up,mlp.down", **fields}), name="a")
    scramble(model, "a")
    lk.save(model, "a", folder)
    return output(model)


def written_by_peft(folder: Path, family: str = "mixtral", **fields: Any) -> nn.Module:
    theirs = get_peft_model(
        tiny(family), LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], **fields})
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value += 0.05 * torch.randn(value.shape, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


# --- our folders


@every_family
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"targets": "linear"},
        {"targets": "mlp.down"},
        {"targets": "mlp.up", "dropout": 0.5},
        {"targets": "mlp.gate,mlp.up,attn.q", "ranks": {"mlp.up": 3}, "alphas": {"mlp.gate": 4.0}},
        {"ranks": {"mlp.down": 3}, "alphas": {"mlp.gate_up": 4.0}, "scaling": "alpha/sqrt(r)"},
        {"init": "pissa", "ranks": {"mlp.down": 3}},
        {"targets": "mlp", "init": "pissa"},
    ],
)
def test_what_we_write_both_read(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    expected, again = written(tmp_path / "a", family, **fields), tiny(family)
    lk.load(again, tmp_path / "a", "a")
    assert torch.equal(output(again), expected)
    lk.save(again, "a", tmp_path / "b")
    assert (tmp_path / "b" / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()
    assert close(output(PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()), expected)


def test_the_layout_is_pefts(tmp_path: Path) -> None:
    """A with all rows of one expert together, B with all experts of one rank; the first parameter is wrapped first."""
    written(tmp_path / "a")
    model = tiny("mixtral")
    lk.load(model, tmp_path / "a", "a")
    own, stored = adapter_tensors(model, "a"), load_file(tmp_path / "a" / FILE)
    for slot, name in (("mlp_gate_up", f"{PLACE}.base_layer"), ("mlp_down", PLACE)):
        a_ERI, b_EOR = (own[f"model.layers.0.mlp.experts.{slot}.{factor}"] for factor in "AB")
        for expert in range(4):
            assert torch.equal(stored[f"{name}.lora_A.weight"][2 * expert : 2 * expert + 2], a_ERI[expert])
            for rank in range(2):
                assert torch.equal(stored[f"{name}.lora_B.weight"][:, 4 * rank + expert], b_EOR[expert, :, rank])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert len(config["target_parameters"]) == 4


def test_a_base_with_other_experts_is_noticed(tmp_path: Path) -> None:
    written(tmp_path / "a")
    other = tiny("mixtral")
    other.get_parameter(f"model.layers.1.{DOWN}").data *= 2
    with pytest.raises(BadAdapterFile, match=rf"1 of 4 sampled matrices have other values \(first: .*{DOWN}"):
        lk.load(other, tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameter": "up_proj"}, "no stacked experts up_proj"),
        ({"parameter": 3}, "a bad parameter: 3"),
        ({"path": "model.layers.0.mlp.gate"}, "no stacked experts"),
        ({"slice": [0, 8, 16, 1]}, "no slice"),
        ({"role": "mlp.up", "slice": [48, 48, 96, 1], "rank": 3}, "has shape"),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_fault(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    written(tmp_path / "a", targets="mlp.gate_up")
    rewrite(tmp_path / "a" / FILE, **change)
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("mixtral"), tmp_path / "a")


@pytest.mark.parametrize("method", ["dora", "dylora", "adalora"])
def test_a_file_of_a_method_that_cannot_adapt_experts_is_a_fault(method: str, tmp_path: Path) -> None:
    written(tmp_path / "a", targets="mlp.gate_up")
    rewrite(tmp_path / "a" / FILE, {"name": method})
    with pytest.raises(BadAdapterFile, match="cannot"):
        lk.load(tiny("mixtral"), tmp_path / "a")


def rewrite(file: Path, method: dict[str, Any] | None = None, **change: Any) -> None:
    """Change the header: the method, and the entries of the plan's first placement."""
    tensors, raw = load_file(file), file.read_bytes()
    header = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["lorakit"])
    header["method"] = method or header["method"]
    header["plan"][0] |= change
    file.write_bytes(with_header(tensors, header))


# --- PEFT's folders


@every_family
@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        ({"target_parameters": [GATE_UP, DOWN], "target_modules": ["q_proj"]}, ("q_proj", DOWN, GATE_UP)),
        ({"target_parameters": ["experts.down_proj"]}, ("experts.down_proj",)),
        ({"target_parameters": [GATE_UP], "use_rslora": True}, (GATE_UP,)),
        (
            {"target_parameters": [GATE_UP, DOWN], "rank_pattern": {GATE_UP: 5}, "alpha_pattern": {DOWN: 3}},
            (DOWN, GATE_UP),
        ),
        ({"target_parameters": [f"layers.1.{DOWN}"]}, (f"layers.1.{DOWN}",)),
    ],
)
def test_what_peft_writes_we_read(
    family: str, fields: dict[str, Any], targets: tuple[str, ...], tmp_path: Path
) -> None:
    theirs, ours = written_by_peft(tmp_path / "a", family, **fields), tiny(family)
    lk.load(ours, tmp_path / "a", "a")
    assert close(output(ours), output(theirs))
    assert attached_to(ours, "a").method.targets == targets
    lk.save(ours, "a", tmp_path / "b")
    assert close(output(PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()), output(theirs))


def test_pefts_targets_stay_modules_where_experts_have_the_same_name(tmp_path: Path) -> None:
    theirs = written_by_peft(tmp_path / "a", "qwen2_moe", target_modules=["down_proj"])
    ours = tiny("qwen2_moe")
    lk.load(ours, tmp_path / "a", "a")
    assert {place.parameter for place in attached_to(ours, "a").plan} == {"weight"}
    assert close(output(ours), output(theirs))


@pytest.mark.parametrize(
    ("entry", "shape", "words"),
    [
        ("lora_A", (7, 48), "7 rows for 4 experts"),
        ("lora_A", (8, 47), r"has shape \(8, 47\), the model needs \(8, 48\)"),
        ("lora_B", (32, 9), r"has shape \(32, 9\), the model needs \(32, 8\)"),
        ("lora_A", (12, 48), "has rank 3, but the config says 2"),
        ("lora_A", (), "rank"),
    ],
)
def test_tensors_that_do_not_fit_are_faults(entry: str, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    written_by_peft(tmp_path / "a", target_parameters=[DOWN])
    tensors = load_file(tmp_path / "a" / FILE)
    save_file(tensors | {f"{PLACE}.{entry}.weight": torch.zeros(shape)}, tmp_path / "a" / FILE)
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("mixtral"), tmp_path / "a")


@pytest.mark.parametrize("told", [["mlp.experts.up_proj"], "experts", None, [3]])
def test_target_parameters_that_name_nothing_are_faults(told: object, tmp_path: Path) -> None:
    written_by_peft(tmp_path / "a", target_parameters=[DOWN])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": told}))
    with pytest.raises(BadAdapterFile):
        lk.load(tiny("mixtral"), tmp_path / "a")


# --- merging on disk


def test_merging_on_disk_folds_each_expert(tmp_path: Path) -> None:
    expected, base = written(tmp_path / "a", targets="linear"), tiny("mixtral")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(BadModel, match=r"one matrix an expert.*merge the loaded model"):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    stacked = {key: value.contiguous() for key, value in base.state_dict().items()}
    save_file(stacked, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    assert close(output(type(base).from_pretrained(tmp_path / "merged").eval()), expected)
    changed = stacked | {f"model.layers.0.{DOWN}": stacked[f"model.layers.0.{DOWN}"] * 2}
    save_file(changed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadAdapterFile, match=r"layers.0.mlp.experts has other values"):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "again")


def test_a_merged_model_is_saved_merged(tmp_path: Path) -> None:
    model = tiny("mixtral")
    lk.attach(model, lk.LoRA(rank=2, targets="mlp"), name="a")
    scramble(model, "a")
    lk.merge(model, "a")
    model.save_pretrained(tmp_path / "merged")
    assert close(output(type(model).from_pretrained(tmp_path / "merged").eval()), output(model))
