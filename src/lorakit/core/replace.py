"""Values that an adapter trains instead of the base's: biases, and whole small modules such as a task's head.

The delta holds the replacement; the base's own value stays bit-identical, and rows of one batch may use different ones.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Literal, cast

from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.experts import experts_of
from lorakit.core.layouts import layout_of
from lorakit.core.plan import BIAS, MODULE, Placement
from lorakit.core.quantised import QuantisedLinear
from lorakit.core.sites import ADAPTERS, GROUPS, is_tail, matching, modules_of, sites_of
from lorakit.errors import BadMethod, NoSuchTarget, nearest

BiasMode = Literal["none", "all", "lora_only"]
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class ReplacedBias(Delta):
    """A trained bias (out,), acting by its difference from the base's."""

    def __init__(self, placement: Placement, module: nn.Module) -> None:
        super().__init__(placement, layout_of(module))
        self.base = [module]  # in a list: not a child of ours
        self.bias = nn.Parameter(module.get_parameter("bias").detach().float().clone())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        shift_O = (self.bias - cast(Tensor, self.base[0].bias)).to(y.dtype)
        return y + (self.layout.along_output(shift_O) if self.layout else shift_O)

    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(values) | {"bias": self.bias.detach()}


class ReplacedModule(Delta):
    """A trained twin of one leaf module, computed in float32; the module's own output is not used."""

    def __init__(self, placement: Placement, module: nn.Module) -> None:
        super().__init__(placement, None)
        if isinstance(module, QuantisedLinear):
            raise BadMethod(f"{placement.path} is quantised, so it cannot be trained whole; make it a target instead, "
                            "or load the model without quantisation")  # fmt: skip
        self.twin = _bare_copy(module)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.twin(x.float() if x.is_floating_point() else x)).to(y.dtype)

    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.twin.named_parameters()}


def _bare_copy(module: nn.Module) -> nn.Module:
    """The module again with float32 parameters of its own, without children and hooks."""
    twin = copy.copy(module)
    own = {name: nn.Parameter(p.detach().float().clone()) for name, p in module._parameters.items() if p is not None}
    twin.__dict__["_parameters"] = dict.fromkeys(module._parameters) | own
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.__dict__["_modules"] = {}
    for hooks in _HOOKS + _PRE_HOOKS:
        twin.__dict__[hooks] = OrderedDict()
    return twin


def bias_placements(model: nn.Module, mode: BiasMode, adapted: Iterable[str]) -> list[Placement]:
    """The biases to train: none, `all` of the model's, or those of the `adapted` modules (`lora_only`).

    Raises:
        BadMethod: biases are asked for, but there are none.
    """
    if mode == "none":
        return []
    paths = set(adapted)
    chosen = [path for path, module in modules_of(model) if mode == "all" or path in paths if _has_bias(module)]
    if not chosen:
        kind = type(model).__name__
        where = f"{kind} has" if mode == "all" else f"the adapted layers of {kind} have"
        raise BadMethod(f"{where} no bias to train; choose a method (or bias='none') that acts on weights alone")
    return [Placement(path, "bias", BIAS) for path in chosen]


def _has_bias(module: nn.Module) -> bool:
    """Whether a module adds a bias to its output; one with modules in it may hold theirs (BERT's LM head)."""
    return module._parameters.get("bias") is not None and not set(module._modules) - {ADAPTERS}


def module_placements(model: nn.Module, targets: Iterable[str]) -> list[Placement]:
    """The leaf modules to train whole, below each module that a target (role or glob) names.

    Raises:
        NoSuchTarget: a target names no module with parameters.
    """
    paths: dict[str, None] = {}
    for target in targets:
        leaves = _leaves(model, target)
        if not leaves:
            tails = {path.rsplit(".", 1)[-1] for path, _ in modules_of(model)}
            have = [tail for tail in tails if not tail.isdigit()]
            kind = type(model).__name__
            raise NoSuchTarget(f"no module of {kind} to train matches {target!r}; {nearest(target, have)}")
        stacked = next((path for path in leaves if experts_of(model.get_submodule(path))), None)
        if stacked is not None:
            raise BadMethod(f"{target!r} names the stacked experts of {stacked}, which cannot be trained whole beside "
                            "an adapter; name other modules, or make these a target")  # fmt: skip
        paths |= dict.fromkeys(leaves)
    return [Placement(path, "module", MODULE) for path in paths]


def _leaves(model: nn.Module, target: str) -> list[str]:
    roots = [path for path, _ in modules_of(model) if is_tail(path, target)]
    if target not in GROUPS:
        roots += [site.path for site in matching(sites_of(model), target, model) if site.slice is None]
    below = tuple(f"{root}." for root in roots)
    return [
        path
        for path, module in modules_of(model)
        if (path in roots or path.startswith(below)) and next(module.parameters(recurse=False), None) is not None
    ]
