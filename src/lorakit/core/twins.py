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
from lorakit.core.mode import mode
from lorakit.core.quick import Twin, fits_one_step
from lorakit.core.sites import sites_of
from lorakit.kernels.gated import Activation, gated
from lorakit.kernels.norm import rms_norm
from lorakit.kernels.product import along_last, frozen_linear, takes

_GATED = ("mlp.gate", "mlp.up", "mlp.down")
_EPS = ("variance_epsilon", "eps", "epsilon")
_SCALES = (1e-3, 1.0, 30.0)  # of what a twin is tried on: where an epsilon shows, and where a cap does
_AGREE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of a row's length; half precision: 5e-3
Forward = Callable[[Tensor], Tensor]
Places = tuple[tuple[nn.Module, str, Callable[..., Any]], ...]  # a module, an attribute, and what it is to be


@dataclass(frozen=True, slots=True)
class Quick:
    """What stands in for code of the model's own, and where."""

    places: Places

    @classmethod
    def of(cls, model: nn.Module, *, compile: bool = False) -> Self:
        """The twins that fit this model: of linear and gated layers and of norms; or its blocks, compiled."""
        if compile:
            blocks = [model.get_submodule(site.path) for site in sites_of(model) if site.role == "block"]
            return cls(tuple((block, "_compiled_call_impl", _compiled(block)) for block in blocks))
        norms = ((module, _norm_twins(module)) for module in model.modules())
        gates = ((parent, _gate_twins(*parts)) for parent, parts in _gated_parents(model))
        found = [twin for module, twins in chain(norms, gates) if (twin := _closest(module, twins)) is not None]
        return cls((*cls.products(model).places, *_forwards(found)))

    @classmethod
    def products(cls, model: nn.Module) -> Self:
        """The twins of linear layers alone, which need not be tried."""
        return cls(_forwards([twin for module in model.modules() if (twin := _linear_twin(module)) is not None]))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let them stand in, but where somebody else's code stands already."""
        put: list[tuple[nn.Module, str]] = []
        try:
            for module, attribute, value in self.places:
                if attribute not in module.__dict__:
                    put.append((module, attribute))
                    module.__dict__[attribute] = value
            yield
        finally:
            for module, attribute in put:
                module.__dict__.pop(attribute, None)


def _compiled(block: nn.Module) -> Callable[..., Any]:
    """A block, compiled; where it learns, its input has a gradient: so code for later blocks serves the first too."""
    call = torch.compile(block._call_impl)

    def run(*given: Any, **told: Any) -> Any:
        match given:
            case [Tensor(requires_grad=False) as x, *rest] if torch.is_grad_enabled() and _learns(block):
                return call(x.detach().requires_grad_(), *rest, **told)
        return call(*given, **told)

    return run


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _forwards(twins: list[Twin]) -> Places:
    return tuple((twin.module, "forward", twin) for twin in twins)


def _norm_twins(module: nn.Module) -> list[Forward]:
    """What may be the twin of a norm: of a module with one frozen vector and a small number beside it."""
    weight, eps = module._parameters.get("weight"), next((vars(module)[e] for e in _EPS if e in vars(module)), None)
    alone = len(module._parameters) == 1 and not module._modules and "forward" not in module.__dict__
    if weight is None or not alone or not isinstance(eps, float) or weight.dim() != 1 or weight.requires_grad:
        return []
    return [partial(_norm, weight, eps, 0.0), partial(_norm, weight, eps, 1.0)]


def _norm(weight_H: Tensor, eps: float, offset: float, x: Tensor) -> Tensor:
    return rms_norm(x, weight_H + offset if offset else weight_H, eps)


def _linear_twin(module: nn.Module) -> Twin | None:
    """The twin of a linear layer, where there is a faster product than PyTorch's choice."""
    layout, weight = layout_of(module), module._parameters.get("weight")
    alone = module._parameters.keys() <= {"weight", "bias"} and "forward" not in module.__dict__
    if weight is None or not isinstance(layout, LinearLayout) or not alone or not takes(weight):
        return None
    return Twin(module, partial(_linear, module, layout), weight.dtype)


def _linear(module: Any, layout: LinearLayout, x: Tensor) -> Tensor:
    own = [module.weight] if module.bias is None else [module.weight, module.bias]
    learns = torch.is_grad_enabled()
    if (learns and any(p.requires_grad for p in own)) or not takes(x, *own) or not fits_one_step(x, x):
        return cast(Tensor, type(module).forward(module, x))
    product = frozen_linear if learns and x.requires_grad else along_last
    return product(x, layout.matrix(own[0]), *own[1:])


def _gated_parents(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules with one gate, one up and one down layer of their own, and these."""
    found: dict[str, dict[str, nn.Module]] = {}
    for site in sites_of(model):
        if site.role in _GATED and site.slice is None and not site.experts:
            found.setdefault(site.path.rpartition(".")[0], {})[site.role] = model.get_submodule(site.path)
    for path, parts in found.items():
        parent, own = model.get_submodule(path), list(parts.values())
        others = [child for child in parent.children() if child not in own]  # nothing calls them while a twin stands in
        if len(parts) == len(_GATED) and "forward" not in parent.__dict__ and not any(map(_is_watched, others)):
            yield parent, [parts[role] for role in _GATED]


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _gate_twins(gate: nn.Module, up: nn.Module, down: nn.Module) -> list[Forward]:
    return [partial(_feed_forward, gate, up, down, name) for name in get_args(Activation)]


def _feed_forward(gate: nn.Module, up: nn.Module, down: nn.Module, activation: Activation, x: Tensor) -> Tensor:
    return cast(Tensor, down(gated(gate(x), up(x), activation)))


def _closest(module: nn.Module, twins: list[Forward]) -> Twin | None:
    """The twin whose output and gradient are the module's, in training, on numbers of several sizes."""
    held = chain(module.parameters(), module.buffers())  # a quantised layer's parameters are codes
    like = next((tensor for tensor in held if tensor.is_floating_point()), None)
    if not twins or like is None or like.is_meta:
        return None
    layout = next((found for child in module.modules() if (found := layout_of(child)) is not None), None)
    width = like.shape[-1] if layout is None else layout.in_features
    x = torch.randn(len(_SCALES), width, generator=torch.Generator().manual_seed(0)) * torch.tensor(_SCALES)[:, None]
    with mode(module, training=True), torch.random.fork_rng([like.device] if like.is_cuda else []):
        wanted, *others = (_tried(forward, x.to(like)) for forward in (module.forward, module.forward, *twins))
    again, *distances = (_distance(each, wanted) for each in others)
    enough, best = _AGREE.get(like.dtype, 5e-3), min(range(len(twins)), key=distances.__getitem__)
    return Twin(module, twins[best], like.dtype) if max(again, distances[best]) <= enough else None


def _tried(forward: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The output and the gradient along a random direction; None where it does not take one tensor and give one."""
    try:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = forward(leaf)
            along = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            (gradient,) = torch.autograd.grad((y * along).sum(), leaf)
        return y.detach(), gradient
    except Exception:  # any module's own
        return None


def _distance(found: tuple[Tensor, Tensor] | None, wanted: tuple[Tensor, Tensor] | None) -> float:
    """The largest difference of a row, as a share of its length."""
    if found is None or wanted is None or any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return float("inf")
    shares = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(shares).float().nan_to_num(float("inf")).max().item()
