"""Twins stand in for what they are equal to in training, at every size of number, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lorakit as lk
from lorakit import train
from lorakit.core.quick import is_frozen_linear
from lorakit.core.twins import Quick
from lorakit.evaluate.setting import evaluating
from lorakit.kernels.remade import recipe, remember
from lorakit.train import Train
from tests.tiny import tiny
from tests.train.small import feed


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.product._LEAST", 0)


def twinned(model: nn.Module) -> list[nn.Module]:
    return [module for module, *_ in Quick.of(model).places]


def drops(mlp: Any, x: Tensor) -> Tensor:
    return F.dropout(mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)), 0.1, mlp.training)


def caps(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)).clamp(max=3.0) * mlp.up_proj(x))


def quick_gelu(mlp: Any, x: Tensor) -> Tensor:
    gate = mlp.gate_proj(x)
    return mlp.down_proj(gate * torch.sigmoid(1.702 * gate) * mlp.up_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [drops, caps, quick_gelu])
def test_a_gated_layer_that_does_more_has_no_twin(own: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tiny("llama", dtype=dtype, hidden_size=64, intermediate_size=256, initializer_range=0.2)
    mlp = model.model.layers[0].mlp
    assert mlp in twinned(model)
    mlp.__class__ = type("Other", (type(mlp),), {"forward": own})
    assert mlp not in twinned(model)
    assert model.model.layers[1].mlp in twinned(model)


def test_a_gated_layer_whose_activation_is_watched_has_no_twin() -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.act_fn.register_forward_hook(lambda *given: None)
    assert mlp not in twinned(model)


def test_a_new_norm_has_a_twin() -> None:
    model = tiny("llama").requires_grad_(False)
    nn.init.ones_(model.model.norm.weight)
    assert model.model.norm in twinned(model)


def test_trying_twins_draws_no_random_numbers_and_changes_no_mode() -> None:
    model, state = tiny("llama").eval(), torch.random.get_rng_state()
    Quick.of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def extra(layer: nn.Linear) -> None:
    layer.scale = nn.Parameter(torch.full((5,), 3.0))


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
    "parametrized weight": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 3),
    "pruned weight": lambda layer: prune.l1_unstructured(layer, "weight", 3),
    "pruned for good": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 3), "weight"),
    "one parameter more": extra,
    "no bias": lambda layer: layer.register_parameter("bias", None),
    "strided bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(10)[::2])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_linear_layers_that_somebody_has_changed_give_what_they_gave(change: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 5)
    CHANGES[change](layer)
    model, x = nn.Sequential(layer), torch.randn(3, 4)
    wanted = model(x)
    with evaluating(model):
        assert torch.allclose(model(x), wanted, atol=1e-6)
        assert torch.allclose(layer(input=x), wanted, atol=1e-6)
        assert layer(x[0]).shape == (5,)


def test_a_layer_with_a_forward_of_its_own_is_no_frozen_linear() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    assert is_frozen_linear(layer)
    with Quick.products(layer).on():
        assert is_frozen_linear(layer)
    layer.forward = lambda x: 3 * F.linear(x, layer.weight)
    assert not is_frozen_linear(layer)


def test_a_hook_on_all_modules_sees_what_the_layer_made() -> None:
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="a")
    for parameter in lk.parameters(model):
        nn.init.ones_(parameter)
    seen: list[tuple[Tensor, Tensor]] = []
    note = lambda module, args, y: seen.append((y, y.detach().clone())) if isinstance(y, Tensor) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        model(input_ids=torch.arange(3, 9)[None])
    finally:
        handle.remove()
    assert len(seen) > 5
    assert all(torch.equal(y, before) for y, before in seen)


def test_what_was_changed_in_place_is_kept_and_not_made_again() -> None:
    one = torch.ones(2)
    two = remember(one + one, torch.add, one, one)
    two.mul_(3)
    remaker, tensors = recipe(two)
    assert torch.equal(remaker(*tensors), torch.full((2,), 6.0))


def test_other_derivatives_take_the_plain_path() -> None:
    model = tiny("llama", num_hidden_layers=1, attn_implementation="eager").eval()
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="a")
    x = torch.randn(1, 3, 32)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    assert torch.allclose(found, F.linear(torch.ones_like(x), layer.weight), atol=1e-5)
    assert torch.allclose(torch.jit.trace(layer, x)(x), layer(x), atol=1e-6)


def test_a_layer_that_is_called_with_nothing_has_a_gradient_of_nothing() -> None:
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="a")
    x = torch.zeros(0, 32, requires_grad=True)
    model.model.layers[0].self_attn.q_proj(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 32)


def test_gradients_that_lie_there_already_are_no_part_of_a_step() -> None:
    norms = []
    for before in (False, True):
        torch.manual_seed(0)
        model = tiny("llama")
        lk.attach(model, lk.LoRA(rank=2), name="a")
        if before:
            model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.mul(1000).backward()
        norms.append(next(train.run(model, feed(), Train(steps=1), name="a")).gradient_norm)
    assert norms[0] == norms[1]
