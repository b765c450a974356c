"""DoRA against PEFT, and against its formula in float64."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.core.state import deltas_of
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.interop.merged import merge_checkpoint
from lorakit.methods import dora
from lorakit.methods.dora import Decomposed, DoRA
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.methods.oracle import goes_both_ways, loaded, read_by_peft, scramble_peft, steps_agree, written_by_peft
from tests.tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS = "adapter_model.safetensors"

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    "rslora": ("llama", dict(r=4, use_rslora=True, target_modules="all-linear")),
    "patterns": ("llama", dict(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6})),
    "embedding": ("llama", dict(r=4, target_modules=["embed_tokens", "q_proj"])),
    "gpt2": ("gpt2", dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "bert": ("bert", dict(r=4, target_modules=["query", "value"], bias="lora_only")),
}


def _config(**fields: Any) -> LoraConfig:
    return LoraConfig(use_dora=True, lora_alpha=8, **fields)


def _attached(family: str = "llama", **fields: Any) -> nn.Module:
    model = tiny(family)
    lk.attach(model, DoRA(rank=4, **fields), name="a")
    scramble(model, "a")
    return model


def _own(model: nn.Module) -> list[Decomposed]:
    return [delta for delta in deltas_of(model, "a") if isinstance(delta, Decomposed)]


def _exact(delta: Decomposed) -> Tensor:
    """m (W + s B A) / ‖W + s B A‖ in float64."""
    weight_OI = delta.base.weight().double()
    a_RI, b_OR = (factor.detach().double() for factor in delta.pair())
    new_OI = weight_OI + delta.scale * b_OR @ a_RI
    return new_OI * (delta.magnitude.detach().double() / new_OI.norm(dim=1))[:, None]


@pytest.mark.parametrize("case", CONFIGS)
def test_files_go_both_ways(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    goes_both_ways(family, _config(**fields), tmp_path)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_five_steps_agree_with_peft(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    steps_agree(family, _config(**fields), tmp_path)


def test_convolutions_go_both_ways(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU()), torch.randn(2, 3, 8, 8)
    theirs = get_peft_model(copy.deepcopy(base), _config(r=2, target_modules=["0"])).eval()
    scramble_peft(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    lk.load(ours, tmp_path / "theirs", "a")
    assert close(ours(x), theirs(x))
    lk.save(ours, "a", tmp_path / "ours")
    key = "base_model.model.0.lora_magnitude_vector"
    assert load_file(tmp_path / "ours" / TENSORS)[key].shape == (1, 6, 1, 1)
    lk.merge(ours, "a")
    assert close(ours(x), theirs(x))


@pytest.mark.parametrize("targets", ["attn.q,attn.v", "attention", "attn.k"])
def test_slices_of_a_fused_layer_are_one_layer_to_peft(targets: str, tmp_path: Path) -> None:
    model = _attached("gpt2", targets=targets)
    lk.save(model, "a", tmp_path / "a")
    assert close(output(read_by_peft("gpt2", tmp_path / "a")), output(model))
    assert close(output(loaded("gpt2", tmp_path / "a")), output(model))
    layer = model.transformer.h[0].attn.c_attn
    whole_O = load_file(tmp_path / "a" / TENSORS)["base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector"]
    adapted = {delta.placement.slice.start for delta in _own(model) if delta.placement.path.endswith("h.0.attn.c_attn")}
    for start in (0, 32, 64):
        untouched = close(whole_O[start : start + 32], layer.weight.T[start : start + 32].norm(dim=1), 1e-6)
        assert untouched == (start not in adapted)


def test_saving_while_anything_is_merged_writes_the_same_bytes(tmp_path: Path) -> None:
    model = _attached("gpt2")
    lk.attach(model, lk.LoRA(rank=4, targets="attn.k"), name="b")
    scramble(model, "b")
    lk.save(model, "a", tmp_path / "before")
    for name in ("a", "b"):
        lk.merge(model, name)
        lk.save(model, "a", tmp_path / name)
        lk.unmerge(model)
        assert (tmp_path / name / TENSORS).read_bytes() == (tmp_path / "before" / TENSORS).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attached_and_merged_are_the_formula_in_float64(family: str) -> None:
    model = _attached(family, targets="linear", alpha=9.0)
    x, weights = torch.randn(5, 32), {}
    for delta in _own(model):
        place, bias_O = delta.placement, delta.base.bias()
        x = torch.randn(5, delta.layout.in_features)
        own_OI = delta.base.weight()
        y = torch.nn.functional.linear(x, own_OI, bias_O)
        weights[place] = _exact(delta)
        expected = x.double() @ weights[place].T + (0 if bias_O is None else bias_O.double())
        assert close(delta.after(x, y).double(), expected)
    lk.merge(model, "a")
    for delta in _own(model):
        assert close(delta.base.weight().double(), weights[delta.placement], 1e-6)


def test_the_norm_is_exact_without_forming_the_sum() -> None:
    model = _attached(targets="linear")
    for delta in _own(model):
        a_RI, b_OR = delta.pair()
        direct_O = (delta.base.weight().double() + delta.scale * b_OR.double() @ a_RI.double()).norm(dim=1)
        assert close(delta.lengths(a_RI, b_OR).double(), direct_O, 1e-6)


class _Shapes(TorchDispatchMode):
    """Shapes of everything that is computed, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and not any(result is arg for arg in args):
            self.seen.append(tuple(result.shape))
        return result


def test_no_step_computes_anything_of_the_weights_size() -> None:
    for family in ("llama", "gpt2"):
        model = _attached(family).train()
        delta = _own(model)[0]
        x = torch.randn(3, delta.layout.in_features)
        y = torch.randn(3, len(delta.B), requires_grad=True)
        with _Shapes() as shapes:
            delta.after(x, y).sum().backward()
        assert (32, 4) in shapes.seen  # W Aᵀ
        assert not {(32, 32), (96, 32), (32, 96)} & set(shapes.seen)


def test_the_squares_of_the_weight_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, squares = _attached(), [], dora._squares
    monkeypatch.setattr(dora, "_squares", lambda weight: calls.append(weight) or squares(weight))
    for _ in range(3):
        output(model).pow(2).mean().backward()
    assert len(calls) == len(_own(model))
    model.to(torch.bfloat16)
    for _ in range(3):
        output(model)
    assert len(calls) == 2 * len(_own(model))


def _changes(model: nn.Module, kind: str) -> None:
    weights = [delta.base.module.weight for delta in _own(model)]
    with torch.no_grad():
        if kind == "cast":
            model.to(torch.bfloat16)
        elif kind == "there and back":
            model.to(torch.bfloat16).to(torch.float32)
        elif kind == "in place":
            for weight in weights:
                weight.mul_(2)
        elif kind == "state dict":
            model.load_state_dict({k: v * 2 if "q_proj.weight" in k else v for k, v in model.state_dict().items()})
        elif kind == "replaced":
            for delta in _own(model):
                delta.base.module.weight = nn.Parameter(3 * delta.base.module.weight, requires_grad=False)
        elif kind == "data":
            for weight in weights:
                weight.data = weight.data + 1
        elif kind == "merged between":
            lk.merge(model, "a")
            output(model)
            lk.unmerge(model)


@pytest.mark.parametrize(
    "kind", ["cast", "there and back", "in place", "state dict", "replaced", "data", "merged between"]
)
def test_the_norm_follows_the_weight(kind: str) -> None:
    model = _attached()
    output(model)
    _changes(model, kind)
    for delta in _own(model):
        a_RI, b_OR = delta.pair()
        direct_O = (delta.base.weight().double() + delta.scale * b_OR.double() @ a_RI.double()).norm(dim=1)
        assert close(delta.lengths(a_RI, b_OR).double(), direct_O, 1e-6)
        assert delta.lengths(a_RI, b_OR).dtype is torch.float32


def test_a_copy_reads_its_own_weight() -> None:
    model = _attached()
    output(model)
    twin = copy.deepcopy(model)
    for mine, other in zip(_own(model), _own(twin), strict=True):
        assert other.base.module is not mine.base.module
        assert other.base.module is twin.get_submodule(other.placement.path)
    expected = output(model)
    with torch.no_grad():
        for delta in _own(twin):
            delta.base.module.weight.mul_(2)
    lk.merge(twin, "a")
    assert torch.equal(output(model), expected)


def test_a_pickled_model_holds_its_weights_once() -> None:
    model = _attached()
    before = len(pickle.dumps(model))
    output(model)
    assert len(pickle.dumps(model)) < before + 32 * 16  # bytes; less than the numbers of any weight


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_fresh_adapter_is_the_base_to_the_bit(family: str, init: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    before = output(model)
    lk.attach(model, DoRA(rank=4, targets="linear", init=init))
    assert torch.equal(output(model), before)
    assert torch.equal(output(model.train()), before)


def test_a_start_that_is_not_zero_is_taken_off_and_saved(tmp_path: Path) -> None:
    model = _attached("gpt2", init="pissa")
    lk.save(model, "a", tmp_path / "a")
    assert close(output(read_by_peft("gpt2", tmp_path / "a")), output(model))
    assert torch.equal(output(loaded("gpt2", tmp_path / "a")), output(model))


def test_a_row_of_zeros_stays_one() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    before, frozen = output(model), bits(model)
    lk.attach(model, DoRA(rank=4, targets="attn.q"), name="a")
    assert torch.equal(output(model), before)
    output(model).pow(2).mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in lk.parameters(model))
    lk.merge(model, "a")
    assert output(model).isfinite().all()
    lk.unmerge(model)
    lk.detach(model, "a")
    assert same_bits(bits(model), frozen)


def test_dropout_acts_as_in_peft(tmp_path: Path) -> None:
    config = _config(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    theirs = written_by_peft("llama", config, tmp_path / "a").train()
    ours = loaded("llama", tmp_path / "a").train()
    found = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        found.append(output(model))
    assert close(*found)
    assert not close(output(ours), output(ours), 0.01)
    assert close(output(ours.eval()), output(theirs.eval()))


def test_training_with_dropout_moves_everything() -> None:
    model = _attached("llama", targets="embed,attn.q", dropout=0.2).train()
    output(model).pow(2).mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in lk.parameters(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_finds_the_norm_in_float32(dtype: torch.dtype) -> None:
    model = _attached().to(dtype)
    delta = _own(model)[0]
    exact_O = delta.lengths(*delta.pair())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta.lengths(*delta.pair()), exact_O)


def test_trained_numbers_are_lora_s_and_one_an_output_unit() -> None:
    model = _attached()
    assert sum(p.numel() for p in lk.parameters(model)) == 2 * (4 * (32 + 32) + 32 + 4 * (32 + 16) + 16)
    assert all(delta.outer == ("B", "magnitude") for delta in _own(model))


def test_a_tied_head_is_refused() -> None:
    model = tiny("llama", tied=True)
    with pytest.raises(BadMethod, match="shares its weight"):
        lk.attach(model, DoRA(targets="head"))


@pytest.mark.parametrize(
    ("value", "words"), [(None, "is missing"), (torch.ones(31), r"has shape \(31,\), the model needs \(32,\)")]
)
def test_a_file_without_its_magnitudes_is_refused(value: Tensor | None, words: str, tmp_path: Path) -> None:
    written_by_peft("llama", _config(r=4, target_modules=["q_proj"]), tmp_path / "a")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors = load_file(tmp_path / "a" / TENSORS)
    del tensors[key]
    save_file(tensors | ({} if value is None else {key: value}), tmp_path / "a" / TENSORS)
    with pytest.raises(BadAdapterFile, match=f"lora_magnitude_vector {words}"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_the_config_says_dora_and_lora_does_not_read_it(tmp_path: Path) -> None:
    model = _attached()
    lk.save(model, "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    assert not lk.LoRA.is_in_peft(config)
    assert DoRA.is_in_peft(config)


def test_tokens_of_a_compiled_model_see_the_present_weight() -> None:
    torch._dynamo.reset()
    model = _attached()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(tokens(model))[0], output(model))
        for delta in _own(model):
            delta.base.module.weight.mul_(1.5)
        assert close(compiled(tokens(model))[0], output(model))


def test_a_checkpoint_on_disk_is_merged_as_the_model_is(tmp_path: Path) -> None:
    model = tiny("gpt2", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    lk.attach(model, DoRA(rank=4, targets="linear"), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    lk.merge(model, "a")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), output(model))
