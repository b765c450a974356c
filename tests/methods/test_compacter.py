"""Compacter: Kronecker sums are what the paper says, A is one for the whole adapter, counts are the published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import lorakit as lk
from lorakit.core.method import Method
from lorakit.core.state import attached_to
from lorakit.errors import BadMethod
from lorakit.methods._narrow import KroneckerProjection, SharedFactors, start_all
from lorakit.methods.bottleneck import Bottleneck
from tests.laws.cases import bits, close, output, same_bits, scramble
from tests.methods.by_hand import PATHS, Change, agrees, nothing, trained
from tests.tiny import tiny

METHODS = {"compacter": Bottleneck.compacter(size=8), "compacter-plus": Bottleneck.compacter_plus(size=8)}
every_preset = pytest.mark.parametrize("preset", METHODS)


def formed(a_NNN: Tensor, s_NP: Tensor, t_NQ: Tensor) -> Tensor:
    """W = sum over i of A_i ⊗ s_i t_iᵀ, formed whole."""
    return sum(torch.kron(a, torch.outer(s, t)) for a, s, t in zip(a_NNN, s_NP, t_NQ, strict=True))


def kronecker(tensors: dict[str, Tensor], prefix: str) -> Change:
    """W_up gelu(W_down y + b) + b', in double precision, with both matrices formed."""
    own = {key.removeprefix(prefix): value.detach().double() for key, value in tensors.items() if prefix in key}
    a_NNN = next(value for key, value in tensors.items() if key.endswith("shared.A")).detach().double()
    down, up = (formed(a_NNN, own[f"{side}.s"], own[f"{side}.t"]) for side in ("down", "up"))
    return lambda y: F.gelu(y @ down.T + own["down.bias"]) @ up.T + own["up.bias"]


@pytest.mark.parametrize(("summands", "width_in", "width_out"), [(1, 5, 3), (2, 4, 6), (4, 12, 8), (3, 3, 9)])
def test_the_product_is_that_of_the_formed_matrix(summands: int, width_in: int, width_out: int) -> None:
    torch.manual_seed(0)
    projection = KroneckerProjection(width_in, width_out, SharedFactors(summands)).double()
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.normal_()
        x = torch.randn(2, 7, width_in, dtype=torch.float64)
        matrix = formed(projection.shared.A, projection.s, projection.t)
        assert matrix.shape == (width_out, width_in)
        assert close(projection(x), x @ matrix.T + projection.bias, 1e-12)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@every_preset
def test_compacter_is_the_published_formula(preset: str, family: str) -> None:
    roles = {"compacter": ("attn.o", "mlp.down"), "compacter-plus": ("mlp.down",)}[preset]
    model, tensors = trained(family, replace(METHODS[preset], train_norms=False))

    def at(number: int, role: str) -> Change:
        if role not in roles:
            return nothing
        f = kronecker(tensors, PATHS[family, role].format(number))
        return lambda y: y + f(y)

    assert agrees(family, model, at)


@pytest.fixture(scope="module")
def t5_base() -> PreTrainedModel:
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 222_903_552
    return model


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (Bottleneck.compacter(), 161_728),
        (Bottleneck.compacter_plus(), 104_704),
        (Bottleneck.houlsby(size=24, train_norms=True), 1_855_104),
    ],
)
def test_trained_parameters_of_t5_base_are_the_papers(
    t5_base: PreTrainedModel, method: Method, parameters: int
) -> None:
    with torch.device("meta"):
        lk.attach(t5_base, method)
    norms = [placement for placement in attached_to(t5_base, "default").plan if placement.is_replaced]
    counted = lk.summary(t5_base).trainable_parameters
    lk.detach(t5_base, "default")
    assert counted == parameters
    assert len(norms) == 62


@every_preset
def test_shared_factors_are_one_tensor_trained_and_saved_once(preset: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    lk.attach(model, METHODS[preset], name="a")
    scramble(model, "a")
    assert len([p for p in lk.parameters(model) if p.shape == (4, 4, 4)]) == 1
    lk.save(model, "a", tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len([key for key in stored if key.endswith("shared.A")]) == 1
    other = tiny("gpt2")
    lk.load(other, tmp_path / "a", name="a", trainable=True)
    assert torch.equal(output(other), output(model))
    factors = {id(m.A) for m in other.modules() if isinstance(m, SharedFactors)}
    assert len(factors) == 1  # still one after loading
    output(other).pow(2).mean().backward()
    grad = next(p for p in lk.parameters(other) if id(p) in factors).grad
    assert grad is not None
    assert bool(grad.any())


def test_two_adapters_share_nothing() -> None:
    model = tiny("gpt2")
    for name in "ab":
        lk.attach(model, METHODS["compacter"], name=name)
    one, other = ({id(p) for p in lk.parameters(model, name)} for name in "ab")
    assert not one & other


def test_factors_start_as_in_the_authors_code() -> None:
    """A is N(0, 0.01²); each s_i and t_i uniform on ± sqrt(2) sqrt(6 / (1 + its length)); biases are zero."""
    torch.manual_seed(0)
    shared = SharedFactors(16)
    projection = KroneckerProjection(64, 160, shared)
    start_all([projection, shared])
    assert abs(float(shared.A.detach().std()) - 0.01) < 0.0005
    for factor, length in ((projection.s, 10), (projection.t, 4)):
        bound = (2 * 6 / (1 + length)) ** 0.5
        assert 0.9 * bound < float(factor.detach().abs().max()) <= bound
    assert not projection.bias.any()


@pytest.mark.parametrize(("size", "summands", "fits"), [(6, 3, "1, 2,"), (8, 8, ""), (10, 5, "1, 2,")])
def test_summands_have_to_divide_both_widths(size: int, summands: int, fits: str) -> None:
    model, method = tiny("bert"), Bottleneck.compacter(size=size, kronecker=summands)
    before, attributes = bits(model), set(vars(model))
    if not fits:
        lk.attach(model, method)
        return
    with pytest.raises(
        BadMethod, match=f"sum of {summands} has to divide the width 32 of .* take kronecker out of {fits}"
    ):
        lk.attach(model, method)
    assert same_bits(bits(model), before)
    assert set(vars(model)) == attributes
