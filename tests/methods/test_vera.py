"""VeRA against PEFT, against its formula in float64, and against the counts of its paper."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

import lorakit as lk
from lorakit.core.state import adapter_tensors, deltas_of
from lorakit.errors import BadAdapterFile, BadMethod, NoSuchTarget
from lorakit.methods.vera import Projections, ScaledProjection, VeRA
from tests.laws.cases import close, output, scramble
from tests.methods.oracle import goes_both_ways, loaded, read_by_peft, steps_agree, written_by_peft
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(r=16, target_modules=["q_proj", "v_proj"])),
    "shapes": ("llama", dict(r=16, target_modules="all-linear", projection_prng_key=5, d_initial=0.3)),
    "without projections": ("llama", dict(r=16, target_modules=["v_proj", "down_proj"], save_projection=False)),
    "gpt2": ("gpt2", dict(r=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "bert": ("bert", dict(r=16, target_modules=["query", "value"])),
}


def _attached(family: str = "llama", **fields: Any) -> nn.Module:
    model = tiny(family)
    lk.attach(model, VeRA(**{"rank": 16, **fields}), name="a")
    scramble(model, "a", std=0.2)
    return model


def _own(model: nn.Module) -> list[ScaledProjection]:
    return [delta for delta in deltas_of(model, "a") if isinstance(delta, ScaledProjection)]


@pytest.mark.parametrize("case", CONFIGS)
def test_files_go_both_ways(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    goes_both_ways(family, VeraConfig(**fields), tmp_path)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_five_steps_agree_with_peft(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    steps_agree(family, VeraConfig(**fields), tmp_path)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_draws_peft_s_matrices(seed: int) -> None:
    theirs = get_peft_model(
        tiny("llama"), VeraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=seed)
    )
    ours = _attached(targets="attn.q,attn.v,mlp.down", seed=seed)
    shared = _own(ours)[0].projections
    assert torch.equal(shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.B, theirs.base_model.vera_B["default"])
    assert shared.A.shape == (16, 48)
    assert shared.B.shape == (32, 16)


@pytest.mark.parametrize("written", [True, False])
def test_the_projections_are_written_or_drawn_again(written: bool, tmp_path: Path) -> None:
    model = _attached(save_projection=written)
    lk.save(model, "a", tmp_path / "a")
    found = {"base_model.vera_A", "base_model.vera_B"} & load_file(tmp_path / "a" / TENSORS).keys()
    assert len(found) == 2 * written
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["save_projection"] == written
    assert torch.equal(output(loaded("llama", tmp_path / "a")), output(model))
    assert close(output(read_by_peft("llama", tmp_path / "a")), output(model))


def test_projections_of_another_seed_come_from_the_file(tmp_path: Path) -> None:
    model = _attached(seed=3)
    lk.save(model, "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | {"projection_prng_key": 4}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    save_file(load_file(tmp_path / "a" / TENSORS), tmp_path / "a" / TENSORS)  # without our header
    again = loaded("llama", tmp_path / "a")
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("targets", ["attn.q,attn.v", "linear", "attn.k,mlp.up,mlp.down"])
def test_slices_with_a_d_each_are_one_layer_to_peft(family: str, targets: str, tmp_path: Path) -> None:
    model = _attached(family, targets=targets)
    lk.save(model, "a", tmp_path / "a")
    assert close(output(read_by_peft(family, tmp_path / "a")), output(model))
    again = loaded(family, tmp_path / "a")
    assert torch.equal(output(again), output(model))
    for key, value in adapter_tensors(again, "a").items():
        assert torch.equal(value, adapter_tensors(model, "a")[key])
    lk.save(again, "a", tmp_path / "b")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attached_and_merged_are_the_formula_in_float64(family: str) -> None:
    model, expected = _attached(family, targets="linear"), {}
    for delta in _own(model):
        shared, place = delta.projections, delta.placement
        a_RI, b_OR = shared.A[:, : delta.layout.in_features].double(), shared.B[: len(delta.b)].double()
        update_OI = delta.b.detach().double()[:, None] * b_OR @ (delta.d.detach().double()[:, None] * a_RI)
        x, y = torch.randn(5, delta.layout.in_features), torch.randn(5, len(delta.b))
        assert close(delta.after(x, y).double(), y.double() + x.double() @ update_OI.T)
        expected[place] = _weight(model, delta).double() + update_OI
    lk.merge(model, "a")
    for delta in _own(model):
        assert close(_weight(model, delta).double(), expected[delta.placement], 1e-6)


def _weight(model: nn.Module, delta: ScaledProjection) -> Tensor:
    weight_OI = delta.layout.matrix(model.get_submodule(delta.placement.path).weight.detach())
    return weight_OI if delta.placement.slice is None else delta.placement.slice.take(weight_OI, 0)


def test_all_sites_share_one_pair_that_is_not_trained_nor_kept_by_state_dicts() -> None:
    model = _attached(targets="linear")
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        (shared,) = {id(delta.projections): delta.projections for delta in _own(each)}.values()
        assert isinstance(shared, Projections)
        assert shared.A.dtype is shared.B.dtype is torch.float32
    assert {key.rsplit(".", 1)[1] for key in model.state_dict() if ".adapters." in key} == {"d", "b"}
    assert sum(p.numel() for p in lk.parameters(model)) == sum(16 + len(delta.b) for delta in _own(model))


def test_d_and_b_begin_as_told() -> None:
    model = tiny("llama")
    lk.attach(model, VeRA(rank=8, d_initial=0.25), name="a")
    assert all(bool((delta.d == 0.25).all()) and not delta.b.any() for delta in _own(model))


COUNTS = [
    (RobertaModel, RobertaConfig(vocab_size=50265), 1024, 43_008),
    (RobertaModel, RobertaConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16), 256, 61_440),
    (GPT2LMHeadModel, GPT2Config(n_layer=24, n_embd=1024, n_head=16), 1024, 98_304),
    (GPT2LMHeadModel, GPT2Config(n_layer=36, n_embd=1280, n_head=20), 1024, 165_888),
]


@pytest.mark.parametrize(("kind", "config", "rank", "expected"), COUNTS)
def test_counts_are_the_paper_s(kind: Any, config: Any, rank: int, expected: int) -> None:
    """|Θ| = layers tuned (d_model + r), with q and v tuned in each block."""
    with torch.device("meta"):
        model = kind(config)
    lk.attach(model, VeRA(rank=rank, targets=("attn.q", "attn.v")), name="a")
    assert lk.summary(model).trainable_parameters == expected


@pytest.mark.parametrize(
    ("targets", "error"), [("embed", BadMethod), ("norm.mlp", BadMethod), ("attn.x", NoSuchTarget)]
)
def test_other_layers_are_refused(targets: str, error: type[Exception]) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=r"vera needs Linear or Conv1D layers|no module of"):
        lk.attach(model, VeRA(targets=targets))
    assert not any(".adapters." in key for key in model.state_dict())


@pytest.mark.parametrize("fields", [dict(rank=0), dict(dropout=1.0), dict(seed=-1), dict(d_initial=float("nan"))])
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadMethod, match=f"{next(iter(fields))}="):
        VeRA(**fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop("base_model.vera_B"), "its config says that it holds"),
        (lambda t, c: t.update({"base_model.vera_B": torch.ones(3, 3)}), r"vera_B has shape \(3, 3\)"),
        (lambda t, c: c.update(r=4), r"have the ranks \[16\], but its config says 4"),
        (lambda t, c: c.update(r="x"), "bad r: 'x'"),
        (lambda t, c: [t.pop(key) for key in list(t) if "lambda" in key], "no tensors that end in .vera_lambda_d"),
        (lambda t, c: t.pop(next(key for key in t if key.endswith("lambda_b"))), "vera_lambda_b is missing"),
    ],
)
def test_a_bad_folder_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    written_by_peft("llama", VeraConfig(r=16, target_modules=["q_proj"]), tmp_path / "a")
    tensors, config = load_file(tmp_path / "a" / TENSORS), json.loads((tmp_path / "a" / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "a" / TENSORS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("llama"), tmp_path / "a")


def test_a_combination_keeps_the_projections(tmp_path: Path) -> None:
    model = tiny("gpt2")
    lk.attach(model, lk.combine(VeRA(rank=8), lk.IA3()), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    assert torch.equal(output(loaded("gpt2", tmp_path / "a")), output(model))
