"""Full fine-tuning: all weights are trained, or those of the last blocks (FT and FT-Top2 of Hu et al. 2021).

The trained weights of a module stand in for the base's while it runs, so nothing is computed twice and the base keeps
its bits. Tensors here are weights of any shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.method import Method, Rules, Tensors
from lorakit.core.plan import MODULE, Placement, Plan
from lorakit.core.replace import module_placements
from lorakit.core.sites import ADAPTERS, modules_of, sites_of
from lorakit.core.state import Adapters
from lorakit.errors import BadMethod, BadState
from lorakit.methods._targeted import whole

WHOLE = "whole"
Weight = tuple[str, nn.Module, str, nn.Parameter]  # its dotted name, the module and key that hold it, and itself


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """W is trained itself: every weight of the model, or of its last `top` blocks.

    What is saved is the difference from the base, W - W0, so a file is as large as the model. In memory there are two
    copies of each trained weight: the base's, and a float32 one. Tied weights are trained once.

    Example:
        >>> Full(top=2) == Full.of_fields(Full.presets["full-top2"])
        True

    Paper: the baselines FT and FT-Top2 of Hu et al. 2021, https://arxiv.org/abs/2106.09685; the latter is from Li and
    Liang 2021, https://arxiv.org/abs/2101.00190.
    """

    name: ClassVar[str] = "full"
    kinds: ClassVar[tuple[str, ...]] = (WHOLE,)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"full-top2": {"top": 2}}
    waives: ClassVar[Mapping[str, str]] = {"rows": "a weight is the same for all rows of a batch"}
    replaces_weights: ClassVar[bool] = True

    top: int = 0  # train only the last k blocks; 0 trains the whole model

    def _rules(self) -> Rules:
        yield whole("top", self.top, 0)

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One placement for each module with weights, and one for each stack of blocks.

        Raises:
            BadMethod: fewer blocks than `top`, or weights that no module holds but the model itself.
        """
        del statistics
        blocks = [site.path for site in sites_of(model) if site.role == "block"]
        if self.top > len(blocks):
            raise BadMethod(f"top={self.top} asks for more blocks than the {len(blocks)} of {type(model).__name__}")
        below = tuple(f"{path}." for path in blocks[-self.top :]) if self.top else ("",)
        apart = {placement.path for placement in module_placements(model, self.train)}
        hosts = [path for path in _hosts(model, blocks) if f"{path}.".startswith(below) and path not in apart]
        if "" in hosts:
            raise BadMethod(f"{type(model).__name__} itself holds weights, beside its modules, which cannot be trained "
                            "whole; train its last blocks alone (top)")  # fmt: skip
        roles = {site.path: site.role for site in sites_of(model) if site.slice is None}
        return [Placement(path, roles.get(path, "other"), WHOLE) for path in hosts]

    def shared(self, plan: Plan, model: nn.Module) -> nn.Module:
        """The trained weights, one for each distinct weight of the base.

        Raises:
            BadMethod: a weight is not of a floating-point type (a quantised one).
        """
        return Shared(plan, model)

    def minds_ties(self, placement: Placement) -> bool:
        """All holders of a tied weight get the same trained one."""
        return False

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> StandIn:
        """Room for the trained weights of a module and of those below it."""
        return StandIn(placement, module, cast(Shared, shared).held[placement.path])

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """A fresh adapter is the base."""
        del model, statistics
        for _, held in _distinct(deltas):
            held.trained.begin(held.base)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """The differences from the base, by the names of its parameters."""
        tensors: Tensors = {}
        for delta, held in _distinct(deltas):
            name = f"{delta.placement.path}.{held.name}"
            tensors |= {f"{name}.{key}": value for key, value in held.trained.difference(delta.base(held)).items()}
        return {}, tensors

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy base and difference into the deltas; of a base without values, the difference alone is kept."""
        faults: list[str] = []
        for delta, held in _distinct(deltas):
            name = f"{delta.placement.path}.{held.name}"
            told = {key: tensors.pop(f"{name}.{key}", None) for key in ("difference", "rest", "rest_at")}
            found = _Difference(**told)
            wrong = found.faults(name, held.trained.value.shape)
            faults += wrong
            if not wrong:
                held.trained.become(found, delta.base(held))
        return faults


class _Difference(NamedTuple):
    """A difference d as it is in a file: where base + d is not exactly the trained value, `rest` is what it lacks."""

    difference: Tensor | None
    rest: Tensor | None
    rest_at: Tensor | None  # places in the flattened weight

    def faults(self, name: str, shape: torch.Size) -> list[str]:
        """What is wrong with it."""
        if self.difference is None:
            return [f"{name}.difference is missing"]
        if self.difference.shape != shape:
            have = tuple(self.difference.shape)
            return [f"{name}.difference has shape {have}, the model needs {tuple(shape)}"]
        if self.rest is None and self.rest_at is None:
            return []
        if self.rest is None or self.rest_at is None or self.rest.dim() != 1 or self.rest.shape != self.rest_at.shape:
            return [f"{name}.rest and {name}.rest_at do not belong together"]
        inside = self.rest_at.dtype in (torch.int32, torch.int64)
        if inside and self.rest_at.numel():
            inside = 0 <= int(self.rest_at.min()) <= int(self.rest_at.max()) < shape.numel()
        return [] if inside else [f"{name}.rest_at names places that {name} does not have"]

    def added_to(self, base: Tensor) -> Tensor:
        """base + difference, in float32, to the bit of what was saved if this is the base it was saved on."""
        value = base.float() + cast(Tensor, self.difference).to(base.device, torch.float32)
        if self.rest is not None and self.rest_at is not None:
            value.view(-1)[self.rest_at.to(base.device).long()] += self.rest.to(base.device, torch.float32)
        return value


class Trained(nn.Module):
    """One trained weight in float32, held by every module whose weight it stands in for."""

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        device = "meta" if base.is_meta else None
        self.value = nn.Parameter(torch.empty(base.shape, dtype=torch.float32, device=device))
        self.waiting: _Difference | None = None  # for a base whose values are not here
        self.holders = 0  # more than one where weights are tied

    @torch.no_grad()
    def begin(self, base: Tensor) -> None:
        """Start as the base."""
        self.value.copy_(base)

    @torch.no_grad()
    def become(self, found: _Difference, base: Tensor) -> None:
        """Be base + difference."""
        if base.is_meta:
            self.waiting = found
        elif not self.value.is_meta:
            self.value.copy_(found.added_to(base.detach().cpu()))

    @torch.no_grad()
    def difference(self, base: Tensor) -> Tensors:
        """What `become` needs; in float32, base + (value - base) may lack a last bit of the value."""
        base = base.detach().float()
        found = (self.value - base).add_(0.0)  # -0 becomes 0, as it would by being saved and loaded
        if found.is_meta:
            return {"difference": found}
        rest = self.value - (base + found)  # exact: the two are neighbours, or the sum is zero
        rest_at = rest.view(-1).nonzero().view(-1)
        if not len(rest_at):
            return {"difference": found}
        index = torch.int32 if found.numel() <= torch.iinfo(torch.int32).max else torch.int64
        return {"difference": found, "rest": rest.view(-1)[rest_at], "rest_at": rest_at.to(index)}

    def merged(self, base: Tensor) -> Tensor:
        """What becomes the weight."""
        return self.value.detach().clone() if self.waiting is None else self.waiting.added_to(base)


class Held(NamedTuple):
    """A weight that is stood in for: its name below the host, the module and key that hold it, and the trained one.

    A weight may be held several times; the `first` to hold it saves and merges it.
    """

    name: str
    module: nn.Module
    key: str
    trained: Trained
    first: bool

    @property
    def base(self) -> nn.Parameter:
        """The base's parameter (between forwards: during one, the trained weight is in its place)."""
        return cast(nn.Parameter, self.module._parameters[self.key])


class Shared(nn.Module):
    """The trained weights of one adapter, by the path of the placement that holds them."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        super().__init__()
        apart = {id(model.get_submodule(placement.path)) for placement in plan if placement.kind == MODULE}
        found: dict[int, Trained] = {}
        self.held: dict[str, list[Held]] = {}
        for path in (placement.path for placement in plan if placement.kind == WHOLE):
            self.held[path] = []
            for name, module, key, base in _weights(model.get_submodule(path), apart):
                if not base.is_floating_point():
                    what = f"{path}.{name} is of the type {base.dtype}, which cannot be trained"
                    raise BadMethod(f"{what}; load the model without quantisation")
                first = id(base) not in found
                if first:
                    found[id(base)] = Trained(base)
                found[id(base)].holders += 1
                self.held[path].append(Held(name, module, key, found[id(base)], first))


class StandIn(Delta):
    """The trained weights of a module and of those below it; they are its weights while it runs."""

    per_row = False
    mixes = False

    def __init__(self, placement: Placement, module: nn.Module, held: list[Held]) -> None:
        super().__init__(placement, None)
        self.host, self.held = [module], held  # in lists: not children of ours
        self.trained = nn.ModuleDict({each.name.replace(".", "/"): each.trained for each in held})
        self.taken: list[nn.Parameter] = []

    @property
    def may_rest(self) -> bool:
        """Whether each of its weights has another host or a tied one, so that none is left untrained."""
        return all(each.trained.holders > 1 for each in self.held)

    def base(self, held: Held) -> Tensor:
        """The base's value of a weight, also while something is merged into it."""
        adapters = self.host[0]._modules.get(ADAPTERS)
        return adapters.state.original(held.base) if isinstance(adapters, Adapters) else held.base

    def enter(self, module: nn.Module, share: Tensor | None = None) -> None:
        """Put the trained weights in, cast to the base's dtype where that differs.

        Raises:
            BadState: the module will be run again in backward, when they are not there.
        """
        self.leave(module)
        if _is_run_again(module):
            raise BadState(f"{self.placement.path} holds weights of its own, which gradient checkpointing recomputes "
                           "without its adapters; train all weights without it")  # fmt: skip
        self.taken = [each.base for each in self.held]
        for each, base in zip(self.held, self.taken, strict=True):
            each.module._parameters[each.key] = cast(nn.Parameter, each.trained.value.to(base.dtype))

    def leave(self, module: nn.Module) -> None:
        """Put the base's weights back."""
        taken, self.taken = self.taken, []
        for each, base in zip(self.held, taken, strict=False):
            each.module._parameters[each.key] = base

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Every weight that it is the first to hold, by its dotted name."""
        return {each.name: each.base for each in self.held if each.first}

    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights, of those that are asked for."""
        own = (each for each in self.held if each.first and each.name in values)
        return {each.name: each.trained.merged(values[each.name]) for each in own}


def _is_run_again(module: nn.Module) -> bool:
    """Whether transformers runs the module's forward once more in backward, and only that: not its hooks."""
    is_layer = any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
    return is_layer and module.training and bool(cast(Any, module).gradient_checkpointing)


def _distinct(deltas: Sequence[Delta]) -> Iterator[tuple[StandIn, Held]]:
    """Every trained weight once, with its first holder."""
    yield from ((delta, held) for delta in deltas if isinstance(delta, StandIn) for held in delta.held if held.first)


def _weights(module: nn.Module, apart: set[int], prefix: str = "") -> Iterator[Weight]:
    """The weights of a module and of those below it, less lists of blocks and modules that are trained apart.

    A module may read a weight without calling the one that holds it: attention its `out_proj`, a stack its relative
    positions. Blocks are called, sometimes around their hooks (to be recomputed), so what they hold has hosts in them.
    """
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{key}", module, key, parameter
    for name, child in module._modules.items():
        if child is not None and name != ADAPTERS and id(child) not in apart and not isinstance(child, nn.ModuleList):
            yield from _weights(child, apart, f"{prefix}{name}.")


def _hosts(model: nn.Module, blocks: list[str]) -> list[str]:
    """The modules with weights, and the stacks of blocks ("": the model itself)."""
    stacks = {_called(model, path.rpartition(".")[0]) for path in blocks} - {""}
    hosts = dict.fromkeys([""] if _has_own(model) else [])
    for path, module in modules_of(model):
        if _has_own(module):
            hosts[_called(model, path)] = None
        elif path in stacks and any(_weights(module, set())):
            hosts[path] = None
    return list(hosts)


def _has_own(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _called(model: nn.Module, path: str) -> str:
    """The nearest module at or above `path` that has a forward, which a mere list of modules lacks ("": the model)."""
    while path and cast(Any, type(model.get_submodule(path))).forward is nn.Module.forward:
        path = path.rpartition(".")[0]
    return path
