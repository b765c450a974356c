"""The base model is read-only: a fresh adapter is the base, and a detached one leaves no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lorakit as lk
from lorakit.core.state import adapter_tensors, attached_to
from lorakit.errors import BadMethod, BadRouting, BadState, LorakitError, NoSuchAdapter, NoSuchTarget
from tests.laws.cases import (
    adapted,
    bits,
    close,
    every_case,
    every_dtype,
    method_named,
    output,
    same_bits,
    scramble,
    waived,
)
from tests.tiny import tiny

UNMOVED = (  # not in the first output; softmax does not see a bias of k
    *("pooler.dense.adapters", "key.adapters.a.bias", "k_proj.adapters.a.bias", "attn_k.trained.bias"),
    *("pooler.adapters", ".unread"),
)


@torch.no_grad()  # a kernel may be chosen by whether gradients are wanted
@every_case
@every_dtype
def test_a_fresh_adapter_is_the_base(family: str, method: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    before = output(model)
    lk.attach(model, method_named(method))
    if waived(method, "fresh"):
        assert output(model).isfinite().all()
    elif method == "lora-norm" and dtype is torch.bfloat16:  # a norm trained whole is computed in float32
        assert close(output(model), before, 0.05)
    else:
        assert torch.equal(output(model), before)


@every_case
@every_dtype
def test_attaching_and_detaching_leave_no_trace(family: str, method: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    frozen = next(model.parameters()).requires_grad_(False)
    before, kind, modules = bits(model), type(model), [type(module) for module in model.modules()]
    attributes, flags = set(vars(model)), {name: p.requires_grad for name, p in model.named_parameters()}
    lk.attach(model, method_named(method))
    inside = {key: value for key, value in bits(model).items() if ".adapters." not in key}
    assert same_bits(inside, before)
    assert type(model) is kind
    lk.detach(model, "default")
    assert same_bits(bits(model), before)
    assert [type(module) for module in model.modules()] == modules
    assert set(vars(model)) == attributes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not frozen.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_case
def test_only_the_adapter_trains_and_all_of_it_does(family: str, method: str) -> None:
    model = adapted(family, method).train()
    before = bits(model)
    optimizer = torch.optim.SGD(lk.parameters(model, "a"), lr=0.1)
    output(model).pow(2).mean().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        if not any(idle in key for idle in UNMOVED) and not key.endswith((".A0", ".B0")):
            assert torch.equal(value, before[key]) == (".adapters." not in key), key
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


@every_case
@every_dtype
def test_deepcopy_and_pickle_carry_adapters_along(family: str, method: str, dtype: torch.dtype) -> None:
    model = adapted(family, method, dtype)
    expected, base = output(model), None
    with lk.use(model, None):
        base = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), expected)
        scramble(twin, "a", seed=9)
        assert not torch.equal(output(twin), expected)
        with lk.use(twin, None):
            assert torch.equal(output(twin), base)
            assert torch.equal(output(model), expected)


@every_case
def test_masters_stay_float32_when_the_model_is_cast(family: str, method: str) -> None:
    model = adapted(family, method)
    before = {key: value.detach().clone() for key, value in adapter_tensors(model, "a").items()}
    model.to(torch.bfloat16)
    assert output(model).dtype is torch.bfloat16
    for key, value in adapter_tensors(model, "a").items():
        assert torch.equal(value, before[key])
        assert value.dtype is torch.float32


def test_save_pretrained_writes_the_base_alone_and_a_merged_model_merged(tmp_path) -> None:
    model = adapted("llama", "lora")
    with lk.use(model, None):
        base = output(model)
    model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert again.state_dict().keys() == tiny("llama").state_dict().keys()
    assert torch.equal(output(again), base)
    lk.merge(model, "a")
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), output(model))


def test_the_model_keeps_its_class_and_signature() -> None:
    model = adapted("llama", "lora")
    assert isinstance(model, LlamaForCausalLM)
    assert model.forward.__func__ is LlamaForCausalLM.forward
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (dict(targets="attn.quarry"), NoSuchTarget, "did you mean attn.q"),
        (dict(targets="*.q_porj"), NoSuchTarget, "q_proj"),
        (dict(targets=("attn.q", "nothing")), NoSuchTarget, "'nothing'"),
        (dict(targets="norm.attn"), BadMethod, "LlamaRMSNorm"),
        (dict(rank=33), BadMethod, "largest rank"),
        (dict(ranks={"mlp.up": 3}), NoSuchTarget, "'mlp.up'"),
        (dict(bias="all"), BadMethod, "no bias"),
        (dict(train="clasifier"), NoSuchTarget, "'clasifier'"),
        (dict(targets="attn.q", train="attn.q"), BadMethod, "whole"),
    ],
)
def test_a_refused_attach_says_why_and_leaves_the_model_untouched(method: dict, error: type, words: str) -> None:
    model = tiny("llama")
    before, attributes = bits(model), set(vars(model))
    with pytest.raises(error, match=words.replace("*", r"\*")):
        lk.attach(model, lk.LoRA(**method))
    assert same_bits(bits(model), before)
    assert set(vars(model)) == attributes
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        dict(rank=0),
        dict(rank=-1),
        dict(rank=2.5),
        dict(rank="8"),
        dict(ranks={"attn.q": 0}),
        dict(alpha=float("nan")),
        dict(alphas={"attn.q": float("inf")}),
        dict(dropout=1.0),
        dict(init="gausian"),
        dict(scaling="alpha/sqrt"),
        dict(bias="some"),
        dict(targets=()),
    ],
)
def test_hyperparameters_are_checked_where_they_are_written(fields: dict) -> None:
    with pytest.raises(LorakitError):
        lk.LoRA(**fields)


@pytest.mark.parametrize("target", ["embed", "head"])
def test_tied_weights_are_refused_never_half_adapted(target: str) -> None:
    model = tiny("llama", tied=True)
    with pytest.raises(BadMethod, match="shares its weight"):
        lk.attach(model, lk.LoRA(rank=2, targets=target))


def test_names_are_checked() -> None:
    model = tiny("llama")
    with pytest.raises(BadState, match="attach"):
        lk.summary(model)
    lk.attach(model, lk.LoRA(), name="reviews")
    with pytest.raises(BadState, match="already"):
        lk.attach(model, lk.LoRA(), name="reviews")
    with pytest.raises(NoSuchAdapter, match="did you mean reviews"):
        lk.use(model, "review")
    with pytest.raises(BadState, match="needs a name"):
        lk.attach(model, lk.LoRA(), name="")


@pytest.mark.parametrize("name", ["v1.2", "train", "forward", "ä b/c", "state", "adapters", "lora_A", "weight"])
def test_any_name_works(name: str, tmp_path) -> None:
    model = adapted("llama", "lora", torch.float32, name)
    expected = output(model)
    lk.save(model, name, tmp_path / "saved")
    lk.load(model, tmp_path / "saved", name=f"{name}.again")
    assert torch.equal(output(model), expected)
    assert len(lk.parameters(model, name)) == 8
    lk.detach(model, name)
    assert torch.equal(output(model), expected)


def test_attach_and_use_say_which_adapter_is_in_force() -> None:
    model = adapted("llama", "lora", torch.float32, "a", "b")
    with lk.use(model, "a"):
        a = output(model)
        with lk.use(model, None):
            base = output(model)
        assert torch.equal(output(model), a)
    lk.attach(model, lk.LoRA(), name="c", active=False)
    b = output(model)
    assert not torch.equal(a, b)
    with pytest.raises(ZeroDivisionError), lk.use(model, "a"):
        raise ZeroDivisionError
    assert torch.equal(output(model), b)
    lk.use(model, "a")  # without a block it stays
    assert torch.equal(output(model), a)
    lk.detach(model, "a")
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("what", [5, [5], [["a"]], {"a": "x"}, {"a": None}, {3: 1.0}, b"a", {"a"}], ids=str)
def test_what_cannot_be_used_is_said_in_a_sentence(what: Any) -> None:
    model = adapted("llama", "lora")
    expected = output(model)
    with pytest.raises(BadRouting, match=r"use takes a name|the weights of a mixture have to be finite numbers"):
        lk.use(model, what)
    assert torch.equal(output(model), expected)


def test_entering_use_never_changes_trainability() -> None:
    model = adapted("llama", "lora", torch.float32, "a", "b")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with lk.use(model, "a"), lk.use(model, None):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_detaching_in_any_order_leaves_no_trace() -> None:
    model = tiny("llama")
    attributes = set(vars(model))
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    for name in "ab":
        lk.attach(model, lk.LoRA(), name=name)
    lk.detach(model, "b")
    lk.detach(model, "a")
    assert set(vars(model)) == attributes
    assert getattr(model, "_keys_to_ignore_on_save", None) == ignored


def test_detaching_another_adapter_keeps_the_routing_in_force() -> None:
    model = adapted("llama", "lora", torch.float32, "c", "a", "b")
    with lk.use(model, ["a", None, "b"]):
        expected = output(model)
        lk.detach(model, "c")
        assert torch.equal(output(model), expected)
    with lk.use(model, "a"):
        lk.detach(model, "a")
        lk.detach(model, "b")  # the last one goes inside its block
    assert not any(module._forward_hooks for module in model.modules())


def test_offloaded_layers_are_refused_by_name() -> None:
    model = tiny("llama")
    accelerate.cpu_offload(model)
    with pytest.raises(BadState, match=r"q_proj is not here \(offloaded"):
        lk.attach(model, lk.LoRA())


def test_biases_and_a_head_train_together() -> None:
    model = tiny("bert", labels=3)
    lk.attach(model, lk.LoRA(bias="all", train="classifier"))
    paths = [(d.path, d.kind) for d in attached_to(model, "default").plan]
    assert ("classifier", "module") in paths
    assert ("classifier", "bias") not in paths
    assert ("bert.pooler.dense", "bias") in paths
