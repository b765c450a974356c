"""Faster twins of a model's own modules, in their place inside a block, and nowhere else.

The twin of a norm or of a gated layer is tried on random numbers first: it stands in only where its output and its
gradient are those of the module. A linear layer is known by its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor, nn

from lorakit.core.layouts import LinearLayout, layout_of
from lorakit.core.quick import fits_one_step
from lorakit.core.sites import sites_of
from lorakit.kernels import product
from lorakit.kernels.gated import Activation, gated
from lorakit.kernels.norm import rms_norm

_GATED = ("mlp.gate", "mlp.up", "mlp.down")
_EPS = ("variance_epsilon", "eps", "epsilon")
_AGREE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the largest value; half precision: 2e-2
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Quick:
    """The modules that have a twin, and it."""

    twins: tuple[tuple[nn.Module, Forward], ...]
    compiled: tuple[tuple[nn.Module, Callable[..., Any]], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, *, compile: bool = False) -> Self:
        """The twins that fit this model: of norms, and of gated feed-forward layers; or its blocks, compiled."""
        if compile:
            blocks = [model.get_submodule(site.path) for site in sites_of(model) if site.role == "block"]
            return cls((), tuple((block, torch.compile(block._call_impl)) for block in blocks))
        found = [(m, twin) for m in model.modules() if (twin := _norm_twin(m) or _linear_twin(m))]
        gates = [(parent, _gate_twins(*parts)) for parent, parts in _gated_parents(model)]
        found += [(parent, twin) for parent, twins in gates if (twin := _first_equal(parent, twins)) is not None]
        return cls(tuple(found))

    @classmethod
    def products(cls, model: nn.Module) -> Self:
        """The twins of linear layers alone, which need not be tried."""
        return cls(tuple((module, twin) for module in model.modules() if (twin := _linear_twin(module))))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the twins stand in."""
        put = [(module, twin) for module, twin in self.twins if "forward" not in module.__dict__]
        for module, twin in put:
            module.__dict__["forward"] = twin
        for module, call in self.compiled:
            module._compiled_call_impl = call  # what `nn.Module.compile` sets
        try:
            yield
        finally:
            for module, _ in self.compiled:
                module._compiled_call_impl = None
            for module, _ in put:
                module.__dict__.pop("forward", None)


def _norm_twin(module: nn.Module) -> Forward | None:
    """The twin of a norm: of a module with one frozen vector and a small number beside it."""
    weight, eps = module._parameters.get("weight"), next((vars(module)[e] for e in _EPS if e in vars(module)), None)
    alone = len(module._parameters) == 1 and not module._modules and "forward" not in module.__dict__
    if weight is None or not alone or not isinstance(eps, float) or weight.dim() != 1 or weight.requires_grad:
        return None
    return _first_equal(module, [partial(_norm, weight, eps, 0.0), partial(_norm, weight, eps, 1.0)])


def _norm(weight_H: Tensor, eps: float, offset: float, x: Tensor) -> Tensor:
    return rms_norm(x, weight_H + offset if offset else weight_H, eps)


def _linear_twin(module: nn.Module) -> Forward | None:
    """The twin of a linear layer, where there is a faster product than PyTorch's choice."""
    layout, weight = layout_of(module), module._parameters.get("weight")
    if weight is None or not isinstance(layout, LinearLayout) or not product.takes(weight):
        return None
    return None if "forward" in module.__dict__ else partial(_linear, module, layout)


def _linear(module: nn.Module, layout: LinearLayout, x: Tensor) -> Tensor:
    own = [parameter for parameter in module._parameters.values() if parameter is not None]  # the weight, a bias
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in own)
    if trained or not product.takes(x, *own) or not fits_one_step(x, x):
        return cast(Tensor, type(module).forward(module, x))
    if torch.is_grad_enabled() and x.requires_grad:
        return product.frozen_linear(x, layout.matrix(own[0]), *own[1:])
    return product.along_last(x, layout.matrix(own[0]), *own[1:])


def _gated_parents(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules with one gate, one up and one down layer of their own, and these."""
    found: dict[str, dict[str, nn.Module]] = {}
    for site in sites_of(model):
        if site.role in _GATED and site.slice is None and not site.experts:
            found.setdefault(site.path.rpartition(".")[0], {})[site.role] = model.get_submodule(site.path)
    for path, parts in found.items():
        parent = model.get_submodule(path)
        if len(parts) == len(_GATED) and "forward" not in parent.__dict__:
            yield parent, [parts[role] for role in _GATED]


def _gate_twins(gate: nn.Module, up: nn.Module, down: nn.Module) -> list[Forward]:
    return [partial(_feed_forward, gate, up, down, name) for name in get_args(Activation)]


def _feed_forward(gate: nn.Module, up: nn.Module, down: nn.Module, activation: Activation, x: Tensor) -> Tensor:
    return cast(Tensor, down(gated(gate(x), up(x), activation)))


def _first_equal(module: nn.Module, twins: list[Forward]) -> Forward | None:
    """The first twin whose output and gradient are the module's."""
    held = chain(module.parameters(), module.buffers())  # a quantised layer's parameters are codes
    like = next((tensor for tensor in held if tensor.is_floating_point()), None)
    if like is None or like.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    layout = next((found for child in module.modules() if (found := layout_of(child)) is not None), None)
    width = like.shape[-1] if layout is None else layout.in_features
    x = torch.randn(3, width, generator=generator).to(like)
    try:
        wanted = _tried(module.forward, x)
    except Exception:  # it takes more than one tensor, or no such tensor
        return None
    return next((twin for twin in twins if _equal(_tried(twin, x), wanted)), None)


def _tried(forward: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    return y.detach(), gradient


def _equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    share = _AGREE.get(found[0].dtype, 2e-2)
    pairs = zip(found, wanted, strict=True)
    return all(a.shape == b.shape and bool((a - b).abs().max() <= share * b.abs().max()) for a, b in pairs)
