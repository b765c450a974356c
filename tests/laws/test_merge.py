"""Merged equals attached, and unmerge gives the original bits back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.state import adapter_tensors
from lorakit.errors import BadRouting, BadState, NotMergeable
from lorakit.methods.combine import combine
from tests.laws.cases import (
    adapted,
    bits,
    close,
    every_case,
    every_dtype,
    method_named,
    mixes,
    output,
    same_bits,
    scramble,
    waived,
)
from tests.tiny import tiny


@every_case
def test_merged_equals_attached(family: str, method: str) -> None:
    model = adapted(family, method)
    attached, before = output(model), bits(model)
    if waived(method, "merge"):
        with pytest.raises(NotMergeable, match="cannot be merged"):
            lk.merge(model, "a")
        assert same_bits(bits(model), before)
        assert torch.equal(output(model), attached)
        return
    lk.merge(model, "a")
    assert not any(module._forward_hooks for module in model.modules())
    assert close(output(model), attached)


@every_case
def test_bf16_errs_at_most_twice_as_much_as_the_plain_model(family: str, method: str) -> None:
    model = adapted(family, method, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    with lk.use(model, None), lk.use(exact, None):
        plain = _error(output(model), output(exact))
    assert _error(output(model), output(exact)) <= 2 * plain
    if not waived(method, "merge"):
        lk.merge(model, "a")
        assert _error(output(model), output(exact)) <= 2 * plain


def _error(one: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((one.double() - exact).norm() / exact.norm()).detach())


@every_case
@every_dtype
def test_unmerge_restores_every_bit_after_many_merges(family: str, method: str, dtype: torch.dtype) -> None:
    if waived(method, "merge"):
        return  # test_merged_equals_attached says that it is refused
    model = adapted(family, method, dtype, "a", "b")
    before, expected = bits(model), output(model)
    for _ in range(50 if method == "lora" else 2):
        for what in ("a", {"a": 0.3, "b": 0.7}) if mixes(model) else ("a",):
            lk.merge(model, what)
            lk.unmerge(model)
    assert same_bits(bits(model), before)
    assert torch.equal(output(model), expected)


@every_case
def test_a_merged_mixture_equals_the_mixture_in_use(family: str, method: str) -> None:
    model = adapted(family, method, torch.float32, "a", "b")
    weights = {"a": 0.7, "b": -0.4}
    if not mixes(model):
        with pytest.raises(BadRouting, match="mixture"):
            lk.use(model, weights)
        return
    with lk.use(model, weights):
        mixed = output(model)
    if not waived(method, "merge"):
        lk.merge(model, weights)
        if method != "lora-norm":  # a mixture of modules is exact only where they are linear in their weights
            assert close(output(model), mixed)
        lk.unmerge(model)
    with lk.use(model, {"a": 1.0}):
        one = output(model)
    with lk.use(model, "a"):
        assert close(one, output(model))
    with lk.use(model, {"a": 0.0, "b": 0.0}):
        zero = output(model)
    with lk.use(model, None):
        assert close(zero, output(model))


def test_a_mixture_of_a_layers_input_and_its_output_is_refused() -> None:
    """(W + w B A)(x + w (l - 1) x) is no weighted sum of W + B A and W diag(l)."""
    model, down = tiny("gpt2"), {"name": "lora", "rank": 2, "targets": "mlp.down"}
    for name, method in {"a": combine(down, "bitfit"), "b": lk.IA3(), "c": combine("ia3", down)}.items():
        lk.attach(model, method, name=name)
        scramble(model, name)
    for weights in ({"a": 0.7, "b": -0.4}, {"c": 0.5}, {"b": 0.5, "c": 0.5}):
        for verb in (lk.use, lk.merge):
            with pytest.raises(BadRouting, match=r"transformer\.h\.0\.mlp\.c_proj.* mixture"):
                verb(model, weights)
    lk.use(model, "c")


def test_scaled_inputs_and_biases_of_one_layer_can_be_mixed() -> None:
    model = tiny("gpt2")
    for number, (name, method) in enumerate({"a": combine("ia3", "bitfit"), "b": lk.IA3(), "c": lk.BitFit()}.items()):
        lk.attach(model, method, name=name)
        scramble(model, name, seed=number)
    weights = {"a": 0.7, "b": -0.4, "c": 0.5}
    lk.use(model, weights)
    mixed = output(model)
    lk.merge(model, weights)
    assert close(output(model), mixed)


@pytest.mark.parametrize("what", [None, {}, [], ["a"], 5, {"a": "x"}, {"a": None}, {"a": torch.nan}, {3: 1.0}], ids=str)
def test_what_cannot_be_merged_is_said_in_a_sentence(what: Any) -> None:
    model = adapted("llama", "lora")
    before = bits(model)
    with pytest.raises(BadRouting, match=r"name|weights"):
        lk.merge(model, what)
    assert same_bits(bits(model), before)
    lk.merge(model, "a")  # nothing counts as merged


def test_while_merged_nothing_else_is_possible(tmp_path) -> None:
    model = adapted("llama", "lora")
    lk.merge(model, "a")
    for call in (
        lambda: lk.use(model, None),
        lambda: lk.attach(model, lk.LoRA(), name="b"),
        lambda: lk.detach(model, "a"),
        lambda: lk.merge(model, "a"),
    ):
        with pytest.raises(BadState, match="merged"):
            call()
    lk.unmerge(model)
    with pytest.raises(BadState, match="nothing is merged"):
        lk.unmerge(model)


@every_dtype
def test_a_failed_merge_changes_nothing(dtype: torch.dtype) -> None:
    model = adapted("llama", "lora", dtype)
    with torch.no_grad():
        list(adapter_tensors(model, "a").values())[-1].fill_(float("nan"))
    before = {key: value for key, value in bits(model).items() if ".adapters." not in key}
    with pytest.raises(NotMergeable, match="not finite"):
        lk.merge(model, "a")
    after = {key: value for key, value in bits(model).items() if ".adapters." not in key}
    assert same_bits(after, before)
    with lk.use(model, None):
        output(model)


@pytest.mark.parametrize("layer", ["conv", "reflect", "same", "embedding", "linear"])
def test_every_layer_type_merges_to_what_it_does(layer: str) -> None:
    torch.manual_seed(0)
    model, x = _layers(layer)
    base = model(x)
    lk.attach(model, lk.LoRA(rank=2, targets="0"))
    assert torch.equal(model(x), base)
    scramble(model, "default", std=0.3)
    attached = model(x)
    assert not close(attached, base, 0.01)
    lk.merge(model, "default")
    assert close(model(x), attached)
    lk.unmerge(model)
    assert torch.equal(model(x), attached)


def _layers(layer: str) -> tuple[nn.Module, torch.Tensor]:
    image = torch.randn(2, 4, 9, 9)
    if layer == "conv":
        return nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2)), image
    if layer == "reflect":
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect")), image
    if layer == "same":
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", bias=False)), image
    if layer == "embedding":
        return nn.Sequential(nn.Embedding(10, 6)), torch.randint(0, 10, (2, 5))
    return nn.Sequential(nn.Linear(9, 5)), image


def test_rank_and_scale_are_the_formula() -> None:
    model = tiny("llama")
    path = "model.layers.0.self_attn.q_proj"
    weight = model.get_submodule(path).weight.detach().clone()
    for scaling, scale in (("alpha/r", 3 / 4), ("alpha/sqrt(r)", 3 / 2)):
        lk.attach(model, lk.LoRA(rank=4, alpha=3, targets=path, scaling=scaling), name=scaling)
        scramble(model, scaling)
        a, b = adapter_tensors(model, scaling).values()
        lk.merge(model, scaling)
        expected = weight.double() + scale * b.double() @ a.double()
        assert close(model.get_submodule(path).weight.double(), expected, 1e-6)
        lk.unmerge(model)


def test_embedding_and_linear_start_as_the_paper_and_loralib_say() -> None:
    model = tiny("llama")
    for init, test in (("kaiming", lambda a: a.abs().max() <= 32**-0.5), ("gaussian", lambda a: a.std() < 0.03)):
        lk.attach(model, lk.LoRA(rank=4, targets="attn.q,embed", init=init), name=init)
        tensors = adapter_tensors(model, init)
        for key, value in tensors.items():
            zero = key.endswith("B") != ("embed" in key)
            assert bool((value == 0).all()) == zero, key
            assert zero or "embed" in key or test(value)


def test_dropout_acts_on_the_branch_only() -> None:
    model = tiny("llama").train()
    lk.attach(model, lk.LoRA(rank=4, dropout=0.9))
    with lk.use(model, None):
        base = output(model)
    assert torch.equal(output(model), base)  # B is zero: dropping the branch's input changes nothing
    scramble(model, "default")
    assert not torch.equal(output(model), output(model))
    model.eval()
    assert torch.equal(output(model), output(model))


def test_method_is_frozen_comparable_and_jsonable() -> None:
    for name in ("lora-ranks", "lora-bias"):
        method = method_named(name)
        assert type(method).from_json(method.to_json()) == method
