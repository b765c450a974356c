"""(IA)³: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al. 2022, arXiv:2205.05638).

Legend: B batch, T tokens, I in, O out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import Conv1DLayout, Layout
from lorakit.core.method import Names, Rules, Tensors
from lorakit.core.plan import Placement, Plan
from lorakit.core.sites import Site, resolve
from lorakit.errors import BadMethod
from lorakit.methods import _peft as peft
from lorakit.methods._linear import linear_layout, linear_sites, out_features
from lorakit.methods._targeted import Targeted, refuse_slice

OUTPUT, INPUT = "scaled-output", "scaled-input"
ENDING = ".ia3_l"


@dataclass(frozen=True, kw_only=True)
class IA3(Targeted):
    """l ∘ (W x + b) at keys and values, and W (l ∘ x) + b at the feed-forward layer's second matrix; l begins at one.

    A layer that both `targets` and `inputs` name gets its input scaled.

    Example:
        >>> IA3().targets, IA3().inputs
        (('attn.k', 'attn.v'), ('mlp.down',))

    Paper: Liu et al. 2022, https://arxiv.org/abs/2205.05638.
    """

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[str, ...]] = (OUTPUT, INPUT)
    peft_type: ClassVar[str] = "IA3"

    targets: Names = ("attn.k", "attn.v")  # layers whose output is scaled: roles, groups, globs
    inputs: Names = ("mlp.down",)  # layers whose input is scaled

    def _rules(self) -> Rules:
        yield "targets", self.targets, "roles, groups or globs, at least one here or in inputs", bool(self._all())

    def _all(self) -> tuple[str, ...]:
        return (*self.targets, *self.inputs)

    def sites(self, model: nn.Module) -> list[Site]:
        """The sites of both kinds."""
        return linear_sites(self.name, model, self._all())

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One vector a site."""
        early = {(site.path, site.slice) for site in resolve(model, self.inputs)}
        chosen = self.sites(model)
        kinds = [INPUT if (site.path, site.slice) in early else OUTPUT for site in chosen]
        for site, kind in zip(chosen, kinds, strict=True):
            if kind == INPUT and site.slice is not None:
                raise BadMethod(
                    f"{self.name} cannot scale the input of {site.role} alone: {site.path} holds other roles that read "
                    "the same input; name it among targets, which scales its output"
                )
        return [Placement(site.path, site.role, kind, site.slice) for site, kind in zip(chosen, kinds, strict=True)]

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> ScaledInput | ScaledOutput:
        """A vector of ones."""
        kind = ScaledInput if placement.kind == INPUT else ScaledOutput
        if kind is ScaledInput:
            refuse_slice(placement)
        return kind(placement, linear_layout(placement, module))

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields, and one vector a layer: ones where no slice of a fused layer has a value."""
        groups = _by_path(deltas)
        early = [re.escape(path) for path, group in groups.items() if isinstance(group[0], ScaledInput)]
        config = {
            "target_modules": list(groups),
            "feedforward_modules": "|".join(early) if early else [],  # as a pattern: names could match other layers
            "fan_in_fan_out": any(isinstance(delta.layout, Conv1DLayout) for delta in deltas),
            "init_ia3_weights": True,
        }
        return config, {path + ENDING: _together(group) for path, group in groups.items()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The method of a PEFT folder; the vectors' shapes tell whether they scale inputs or outputs."""
        peft.refuse_misfits(config, {"feedforward_modules": list[str] | str | None})
        paths = peft.paths_of(tensors, ENDING)
        early = {path for path in paths if tensors[path + ENDING].shape[:1] == (1,)}
        given, told = config.get("target_modules"), config.get("feedforward_modules")
        rest = [name for name in given if name not in (told or ())] if isinstance(given, list) else given
        method = cls(
            targets=peft.targets(rest, set(paths) - early, model),
            inputs=peft.targets(told, early, model),
            train=peft.trained(config, tensors),
        )
        return method, method.plan(model)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy the vectors out of `tensors`."""
        faults: list[str] = []
        for path, group in _by_path(deltas).items():
            faults += _read(group, path + ENDING, tensors)
        return faults


class _Scaled(Delta):
    """A vector l that begins at one."""

    layout: Layout

    def __init__(self, placement: Placement, layout: Layout, width: int) -> None:
        super().__init__(placement, layout)
        self.vector = nn.Parameter(torch.ones(width))

    def scaled(self, value: Tensor) -> Tensor:
        """value + (l - 1) value: for l near one, bfloat16 keeps more digits of l - 1 than of l."""
        return torch.addcmul(value, value, (self.vector - 1).to(value.dtype))


class ScaledOutput(_Scaled):
    """l (out,) times the site's output."""

    def __init__(self, placement: Placement, layout: Layout) -> None:
        super().__init__(placement, layout, out_features(placement, layout))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """l ∘ y."""
        return self.scaled(y)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of W and entries of b, scaled."""
        l_O = self.vector.to(weight_OI)
        return weight_OI * l_O[:, None], None if bias_O is None else bias_O * l_O


class ScaledInput(_Scaled):
    """l (in,) times the layer's input."""

    def __init__(self, placement: Placement, layout: Layout) -> None:
        super().__init__(placement, layout, layout.in_features)

    def before(self, x: Tensor) -> Tensor:
        """l ∘ x."""
        return self.scaled(x)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns of W, scaled."""
        return weight_OI * self.vector.to(weight_OI), bias_O


def _by_path(deltas: Sequence[Delta]) -> dict[str, list[_Scaled]]:
    return peft.by_path([delta for delta in deltas if isinstance(delta, _Scaled)])


def _together(group: list[_Scaled]) -> Tensor:
    """PEFT's l of the whole layer: (1, in) or (out, 1)."""
    first = group[0]
    if isinstance(first, ScaledInput):
        return first.vector.detach()[None]
    whole_O = first.vector.detach().new_ones(first.layout.out_features)
    for delta in group:
        part = delta.placement.slice
        whole_O = delta.vector.detach() if part is None else part.put(whole_O, delta.vector.detach())
    return whole_O[:, None]


@torch.no_grad()
def _read(group: list[_Scaled], key: str, tensors: Tensors) -> list[str]:
    early, layout = isinstance(group[0], ScaledInput), group[0].layout
    needed = (1, layout.in_features) if early else (layout.out_features, 1)
    found, faults = peft.taken({key: needed}, tensors)
    for delta in () if faults else group:
        part, value = delta.placement.slice, found[key].flatten()
        delta.vector.copy_(value if part is None else part.take(value))
    return faults
