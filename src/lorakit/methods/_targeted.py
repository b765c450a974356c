"""Methods that act on layers with a weight matrix, chosen by targets; and the rules of their fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lorakit.core.layouts import kind_of
from lorakit.core.method import Method, Names, Rules
from lorakit.core.plan import Placement
from lorakit.core.sites import Site, matching, resolve
from lorakit.errors import BadMethod

_LAYERS = "Linear, Conv1D, Embedding or ungrouped Conv2d"


@dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """A method that acts on layers with a weight matrix, chosen by targets."""

    adapts_experts: ClassVar[bool] = False  # stacked ones, which no layer's call computes

    targets: Names = ("attn.q", "attn.v")  # roles, groups, globs; commas separate them in a text

    def _rules(self) -> Rules:
        yield "targets", self.targets, "roles, groups or globs, at least one", bool(self.targets)

    def sites(self, model: nn.Module) -> list[Site]:
        """The targets' sites with a weight matrix; every target names at least one.

        Raises:
            NoSuchTarget: a target that matches nothing.
            BadMethod: a target that matches only modules without a matrix, or stacked experts if it cannot adapt them.
        """
        sites = resolve(model, self.targets)
        for target in self.targets:
            if not any(site.has_matrix for site in matching(sites, target, model)):
                kinds = {kind_of(model.get_submodule(site.path)) for site in matching(sites, target, model)}
                raise BadMethod(f"{self.name} needs {_LAYERS} layers, but {target!r} names {', '.join(sorted(kinds))}")
        stacked = next((site for site in sites if site.experts), None)
        if stacked is not None and not self.adapts_experts:
            raise BadMethod(f"{self.name} cannot adapt stacked experts ({stacked.path}.{stacked.parameter}), which no "
                            "layer's call computes; take targets without them, such as 'attention'")  # fmt: skip
        return [site for site in sites if site.has_matrix]


def refuse_slice(placement: Placement) -> None:
    """Refuse a part of a layer where only the whole will do, as a file may ask for.

    Raises:
        BadMethod: the placement has a slice.
    """
    if placement.slice is not None:
        raise BadMethod(f"{placement.path} cannot hold {placement.kind!r} for a part of its output {placement.slice}; "
                        "give no slice")  # fmt: skip


def whole(name: str, value: int, least: int = 1) -> tuple[str, object, str, bool]:
    """The rule of a whole number that is at least `least`."""
    return name, value, f"a whole number of at least {least}", value >= least


def share(name: str, value: float) -> tuple[str, object, str, bool]:
    """The rule of a number that is at least 0 and below 1."""
    return name, value, "at least 0 and below 1", 0 <= value < 1
