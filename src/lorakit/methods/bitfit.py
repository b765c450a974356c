"""BitFit: every bias is trained, and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lorakit.core.delta import Delta
from lorakit.core.method import Method, Names
from lorakit.core.plan import Placement
from lorakit.core.replace import bias_placements
from lorakit.core.sites import ADAPTERS, resolve
from lorakit.errors import BadMethod

log = logging.getLogger("lorakit")


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """h = W x + b, with b trained and W frozen, in every layer and norm that has a bias.

    `targets` keeps the biases of some modules only; the paper's smaller variant trains those of the query and of the
    layer that widens the MLP: `targets=("attn.q", "mlp.up")`.

    Example:
        >>> BitFit(targets="norm.attn,norm.mlp").targets
        ('norm.attn', 'norm.mlp')

    Paper: Ben Zaken, Ravfogel and Goldberg 2021, https://arxiv.org/abs/2106.10199.
    """

    name: ClassVar[str] = "bitfit"

    targets: Names = ()  # train only the biases at or below these (roles, groups, globs); none: all

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One placement a bias.

        Raises:
            NoSuchTarget: a target that matches nothing.
            BadMethod: a model without biases, or a target that names none, or a part of one.
        """
        del statistics
        biases = bias_placements(model, "all", ())
        if not self.targets:
            _tell_of_others(model, biases)
            return biases
        chosen = {placement.path for target in self.targets for placement in _at(model, target, biases)}
        return [placement for placement in biases if placement.path in chosen]

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Delta:
        """Nothing: biases are the core's own placements."""
        raise BadMethod(f"{placement.path} is planned as {placement.kind!r}, but {self.name} trains biases alone")


def _at(model: nn.Module, target: str, biases: Sequence[Placement]) -> list[Placement]:
    """The biases at or below what a target names."""
    sites = resolve(model, (target,))
    part = next((site.path for site in sites if site.slice is not None), None)
    if part is not None:
        raise BadMethod(f"{target!r} is a part of {part}, whose bias is trained as one; name the whole layer")
    tops = tuple(f"{site.path}." for site in sites)
    found = [placement for placement in biases if f"{placement.path}.".startswith(tops)]
    if not found:
        raise BadMethod(f"{target!r} names no module of {type(model).__name__} with a bias; choose another target")
    return found


def _tell_of_others(model: nn.Module, biases: Sequence[Placement]) -> None:
    """Log the biases that stay frozen because no layer adds them to its output (DeBERTa's q_bias)."""
    trained = {id(model.get_submodule(placement.path).bias) for placement in biases}
    named = (name for name, value in model.named_parameters() if name.endswith("bias") and id(value) not in trained)
    others = [name for name in named if ADAPTERS not in name.split(".")]
    if others:
        log.warning("%d biases are added inside a module, not to a layer's output, and stay frozen: %s", len(others),
                    ", ".join(others[:3]))  # fmt: skip
