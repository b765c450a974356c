"""LoKr against PEFT, and against its formula in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, PeftModel
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.state import adapter_tensors, attached_to, deltas_of
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.methods.lokr import Kronecker, LoKr, factorised
from tests.laws.cases import close, output, scramble
from tests.methods.oracle import goes_both_ways, loaded, steps_agree, written_by_peft
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(r=2, alpha=4, target_modules=["q_proj", "v_proj"])),
    "both": ("llama", dict(r=1, alpha=3, decompose_both=True, decompose_factor=8, target_modules=["q_proj", "o_proj"])),
    "whole": ("llama", dict(r=32, alpha=64, target_modules="all-linear")),
    "factor": ("llama", dict(r=2, alpha=4, decompose_factor=4, target_modules=["up_proj", "down_proj"])),
    "no divisor": ("llama", dict(r=2, alpha=4, decompose_factor=5, target_modules=["up_proj"])),
    "patterns": (
        "llama",
        dict(
            r=2,
            alpha=4,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 3},
            alpha_pattern={"layers.1.mlp.up_proj": 9},
        ),
    ),
    "bert": ("bert", dict(r=2, alpha=4, target_modules=["query", "value"])),
}


def _attached(family: str = "llama", **fields: Any) -> nn.Module:
    model = tiny(family)
    lk.attach(model, LoKr(**{"rank": 2, **fields}), name="a")
    scramble(model, "a", std=0.2)
    return model


def _own(model: nn.Module) -> list[Kronecker]:
    return [delta for delta in deltas_of(model, "a") if isinstance(delta, Kronecker)]


def _exact(delta: Kronecker) -> Tensor:
    """s (w1 ⊗ w2) in float64."""
    own = {name: value.detach().double() for name, value in delta.named_parameters()}
    w1, w2 = (own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in ("w1", "w2"))
    return delta.placement.alpha / delta.placement.rank * torch.kron(w1, w2)


@pytest.mark.parametrize("case", CONFIGS)
def test_files_go_both_ways(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    goes_both_ways(family, LoKrConfig(**fields), tmp_path)


@pytest.mark.parametrize("case", ["llama", "both", "whole", "bert"])
def test_five_steps_agree_with_peft(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    steps_agree(family, LoKrConfig(**fields), tmp_path)


def test_sizes_are_peft_s() -> None:
    for size in (*range(1, 65), 127, 384, 576, 768, 1536, 3072, 4096, 11008):
        for factor in (-1, *range(1, 20), 64, 1000):
            assert factorised(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize(
    "fields", [{}, dict(factor=8), dict(factor=8, rank=1, decompose_both=True), dict(rank=100), dict(alpha=-3.0)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attached_and_merged_are_the_formula_in_float64(family: str, fields: dict[str, Any]) -> None:
    model, expected = _attached(family, targets="linear", **fields), {}
    for delta in _own(model):
        update_OI, out = _exact(delta), delta.layout.out_features
        out = delta.placement.slice.width if delta.placement.slice else out
        x, y = torch.randn(2, 5, delta.layout.in_features), torch.randn(2, 5, out)
        assert close(delta.after(x, y).double(), y.double() + x.double() @ update_OI.T)
        assert close(delta.after(x[0], y[0]), delta.after(x, y)[0], 1e-6)
        expected[delta.placement] = _weight(model, delta).double() + update_OI
    lk.merge(model, "a")
    for delta in _own(model):
        assert close(_weight(model, delta).double(), expected[delta.placement], 1e-6)


def _weight(model: nn.Module, delta: Kronecker) -> Tensor:
    weight_OI = delta.layout.matrix(model.get_submodule(delta.placement.path).weight.detach())
    return weight_OI if delta.placement.slice is None else delta.placement.slice.take(weight_OI, 0)


def test_which_factors_there_are_and_how_they_begin() -> None:
    torch.manual_seed(0)
    shapes = {
        "plain": (dict(factor=8), {"w1": (8, 8), "w2_a": (4, 1), "w2_b": (1, 4)}),
        "both": (
            dict(factor=8, decompose_both=True),
            {"w1_a": (8, 1), "w1_b": (1, 8), "w2_a": (4, 1), "w2_b": (1, 4)},
        ),
        "whole": (dict(factor=8, rank=4), {"w1": (8, 8), "w2": (4, 4)}),
    }
    for fields, wanted in shapes.values():
        model = tiny("llama")
        lk.attach(model, LoKr(**{"rank": 1, "targets": "attn.q", **fields}), name="a")
        for delta in _own(model):
            own = dict(delta.named_parameters())
            assert {name: tuple(value.shape) for name, value in own.items()} == wanted
            for name, value in own.items():
                assert bool(value.any()) == (name not in ("w1", "w1_a"))
                assert value.abs().max() <= value.shape[1] ** -0.5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_layers_that_peft_cannot_have_are_kept_from_it(family: str, tmp_path: Path) -> None:
    """PEFT's LoKr knows no Conv1D, and one product a layer cannot be one a slice."""
    model = _attached(family, targets="attn.q,attn.v")
    lk.save(model, "a", tmp_path / "a")
    again = loaded(family, tmp_path / "a")
    assert torch.equal(output(again), output(model))
    for key, value in adapter_tensors(again, "a").items():
        assert torch.equal(value, adapter_tensors(model, "a")[key])
    with pytest.raises(KeyError, match="LORAKIT_LOKR"):
        PeftModel.from_pretrained(tiny(family), tmp_path / "a")


def test_ranks_and_alphas_of_single_layers_are_kept(tmp_path: Path) -> None:
    family, fields = CONFIGS["patterns"]
    written_by_peft(family, LoKrConfig(**fields), tmp_path / "a")
    plan = {placement.path[13:]: placement for placement in attached_to(loaded(family, tmp_path / "a"), "a").plan}
    assert [plan[path].rank for path in ("0.self_attn.q_proj", "1.mlp.up_proj")] == [2, 3]
    assert [plan[path].scale for path in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.up_proj")] == [2, 4 / 3, 3]


def test_a_factor_that_does_not_divide_is_refused() -> None:
    model = tiny("llama")
    words = r"factor 5 does not divide the matrix of .*q_proj \(32 x 32\); take a divisor of 32"
    with pytest.raises(BadMethod, match=words):
        lk.attach(model, LoKr(factor=5))
    with pytest.raises(BadMethod, match=r"factor 32 .* \(48 x 32\); take a divisor of 16"):
        lk.attach(model, LoKr(factor=32, targets="mlp.up"))
    assert not any(".adapters." in key for key in model.state_dict())


@pytest.mark.parametrize("fields", [dict(rank=0), dict(factor=0), dict(factor=-2), dict(alpha=float("inf"))])
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadMethod, match=f"{next(iter(fields))}="):
        LoKr(**fields)


def test_other_layers_are_refused() -> None:
    with pytest.raises(BadMethod, match="lokr needs Linear or Conv1D layers, but 'embed' names Embedding"):
        lk.attach(tiny("llama"), LoKr(targets="embed"))
    with pytest.raises(BadMethod, match="'linear' names stacked experts"):
        lk.attach(tiny("mixtral"), LoKr(targets="linear"))
    with pytest.raises(BadMethod, match="names Conv2d"):
        lk.attach(nn.Sequential(nn.Conv2d(3, 6, 3)), LoKr(targets="0"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: [t.pop(key) for key in list(t) if "lokr_w2" in key], "it has no LoKr tensors"),
        (lambda t, c: t.pop(next(key for key in t if key.endswith("lokr_w1"))), "lokr_w1 is missing"),
        (lambda t, c: c.update(decompose_factor=2), "lokr_w1 has shape"),
        (lambda t, c: c.update(alpha="x"), "bad alpha: 'x'"),
        (lambda t, c: c.update(rank_pattern={"(": 3}), "cannot be read"),
        (lambda t, c: c.update(r=5), "has rank 2, but the config says 5"),
        (lambda t, c: t.update({"base_model.model.x.lokr_t2": torch.ones(2)}), "x.lokr_t2 is not part of it"),
    ],
)
def test_a_bad_folder_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    family, fields = CONFIGS["llama"]
    written_by_peft(family, LoKrConfig(**fields), tmp_path / "a")
    tensors, config = load_file(tmp_path / "a" / TENSORS), json.loads((tmp_path / "a" / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "a" / TENSORS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("llama"), tmp_path / "a")


def test_dropout_that_we_lack_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = written_by_peft("llama", LoKrConfig(r=2, target_modules=["q_proj"], rank_dropout=0.2), tmp_path / "a")
    ours = loaded("llama", tmp_path / "a")
    assert close(output(ours), output(theirs))
    assert "was trained with rank_dropout" in caplog.text
