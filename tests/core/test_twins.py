"""Faster twins: equal to what they stand in for, there only while a step runs, and nowhere where they do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit import train
from lorakit.core.layouts import LinearLayout, layout_of
from lorakit.core.twins import Quick
from lorakit.methods.lora import LowRank
from lorakit.train import Train
from tests.tiny import tiny
from tests.train.small import adapted, feed

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.product._LEAST", 0)


TWINS = {  # norms and feed-forward layers of two blocks, and the last norm
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), 7),
    "gemma3_text": 15,
    "qwen3": 11,
    "phi3": 5,
    **dict.fromkeys(("gpt2", "opt", "gpt_neox", "bert"), 0),
}


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(3, 27).reshape(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in lk.parameters(model)])
    model.zero_grad()
    return loss.detach(), found


def moved(family: str, targets: tuple[str, ...] = ("linear",), **fields: Any) -> Any:
    torch.manual_seed(0)
    model = tiny(family, **fields)
    lk.attach(model, lk.LoRA(rank=2, targets=targets), name="a")
    with torch.no_grad():
        for parameter in lk.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1:  # a norm whose weight is all ones would hide a wrong twin
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.mark.parametrize("family", TWINS)
def test_twins_give_the_models_loss_and_gradients(family: str) -> None:
    model = moved(family)
    quick = Quick.of(model)
    linear = [module for module in model.modules() if isinstance(layout_of(module), LinearLayout)]
    twins = [module for module, *_ in quick.places]
    assert [module for module in linear if module not in twins] == []
    assert len(twins) - len(linear) == TWINS[family]
    if family == "bert":
        return
    wanted = loss_and_gradients(model)
    with quick.on():
        found = loss_and_gradients(model)
    assert torch.allclose(found[0], wanted[0], rtol=1e-5)
    assert (found[1] - wanted[1]).abs().max() <= 1e-5 * wanted[1].abs().max()


@pytest.mark.parametrize("targets", [("attn.q", "attn.v"), ("linear",), ("mlp.down",), ("mlp.gate", "attn.o")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_of_autograd_is_the_plain_path(
    targets: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved("llama", targets, dtype=dtype)
    found = loss_and_gradients(model)
    taken: list[Any] = []
    real = LowRank.through
    monkeypatch.setattr(LowRank, "through", lambda self, m, x, y: taken.append(real(self, m, x, y.clone())))
    plain = loss_and_gradients(model)
    assert taken and all(each is not None for each in taken)
    share = 1e-5 if dtype is torch.float32 else 5e-2
    assert torch.allclose(found[0].float(), plain[0].float(), rtol=share)
    assert (found[1] - plain[1]).abs().max() <= share * plain[1].abs().max()


def saved_bytes(model: Any, quick: Quick) -> int:
    """Bytes of distinct storages kept for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(3, 51).reshape(2, 24)
    with quick.on(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum()
    loss.backward()
    model.zero_grad()
    return sum(kept.values())


def test_twins_keep_less_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved("llama")
    quick = saved_bytes(model, Quick.of(model))
    monkeypatch.setattr(LowRank, "through", lambda *given: None)
    assert quick < 0.75 * saved_bytes(model, Quick(()))


def test_nothing_stays_on_the_model_between_steps() -> None:
    model = adapted()
    for _ in train.run(model, feed(), Train(steps=2, batch_size=3), name="a"):
        assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_module_that_somebody_has_changed_is_left_alone() -> None:
    model = adapted()
    norm = model.model.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    before = norm.forward
    quick = Quick.of(model)
    assert norm not in [module for module, *_ in quick.places]
    with quick.on():
        assert norm.forward is before


def test_a_norm_that_is_trained_is_left_alone() -> None:
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=2, train=("model.norm",)), name="a")
    assert model.model.norm not in [module for module, *_ in Quick.of(model).places]


@pytest.mark.parametrize("hook", ["forward", "backward"])
def test_a_layer_that_somebody_watches_takes_the_plain_path(hook: str) -> None:
    model = moved("llama", ("attn.q",))
    layer, seen = model.model.layers[0].self_attn.q_proj, []
    if hook == "forward":
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        layer.register_full_backward_hook(lambda module, before, after: seen.append(after[0]))
    delta = next(d for d in layer.adapters.deltas("a"))
    wanted = nn.functional.linear(torch.ones(1, 32), layer.weight)
    out = layer(torch.ones(1, 32))
    assert torch.allclose(out, wanted + delta.branch(torch.ones(1, 32), wanted), atol=1e-6)
    out.sum().backward()
    assert seen and torch.isfinite(seen[0]).all()


@pytest.mark.slow
def test_compiled_blocks_train_the_same_and_are_not_compiled_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: real(call, backend="aot_eager"))
    settings = Train(steps=4, batch_size=6, learning_rate=1e-2)
    one, other = adapted(dropout=0.0), adapted(dropout=0.0)
    losses = [step.loss for step in train.run(one, feed(), settings, name="a")]
    compiled = []
    for step in train.run(other, feed(), replace(settings, compile=True), name="a"):
        compiled.append(step.loss)
        assert all(module._compiled_call_impl is None for module in other.modules())
    assert compiled == pytest.approx(losses, rel=1e-5)


def compiled_frames() -> tuple[int, int]:
    """How many numbers of tokens eight steps read, and how often inductor compiles for them."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, real = CompileCounterWithBackend("inductor"), torch.compile
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", lambda call: real(call, backend=counter))
        settings = Train(steps=8, batch_size=4, learning_rate=1e-2, compile=True)
        steps = list(train.run(adapted(dropout=0.0), feed(), settings, name="a"))
    return len({step.computed for step in steps}), counter.frame_count


@pytest.mark.slow
def test_inductor_compiles_a_few_times_however_batches_differ() -> None:
    """In a process of its own: what a process has compiled before decides what it compiles again."""
    told = "from tests.core.test_twins import compiled_frames; print(*compiled_frames())"
    places = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-c", told]
    found = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=True)
    lengths, frames = map(int, found.stdout.split()[-2:])
    assert lengths > 3
    assert frames <= 8  # four parts of a block, of fixed and of any length; not of each block, nor of each length


@pytest.mark.parametrize(("targets", "wanted"), [(("linear",), [True, True]), (("layers.1.*",), [False, True])])
def test_inputs_of_compiled_blocks_have_a_gradient_from_the_first_that_learns(
    targets: tuple[str, ...], wanted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda call: call)
    model, found = moved("llama", targets), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, given: found.append(given[0].requires_grad))
    plain = loss_and_gradients(model)
    before = found.copy()
    found.clear()
    with Quick.of(model, compile=True).on():
        compiled = loss_and_gradients(model)
        with torch.no_grad():
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert (before, found) == ([False, wanted[0]], [*wanted, False, False])
    assert all(map(torch.equal, plain, compiled))


def test_a_layer_is_fused_again_when_what_stood_in_for_it_is_gone() -> None:
    model = moved("llama", ("attn.q",))
    lk.attach(model, lk.Full(), name="whole", active=False)
    layer = model.model.layers[0].self_attn.q_proj
    (delta,) = layer.adapters.deltas("a")
    assert not delta.is_fused(layer)
    lk.detach(model, "whole")
    assert delta.is_fused(layer)
