"""Stacked experts: the matrices of a mixture's experts, which lie in one parameter and are used without a module call.

Legend: E experts, I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.core.layouts import layout_of

WEIGHT = "weight"  # the parameter in which a layer keeps its matrix


@dataclass(frozen=True)
class Experts:
    """How a module keeps one matrix W_e (out, in) for each of its experts in one parameter.

    `transposed` says that each of them lies as (in, out), `number` which of the module's own parameters it is.
    """

    count: int
    in_features: int
    out_features: int
    transposed: bool
    number: int

    def matrices(self, weight: Tensor) -> Tensor:
        """View the parameter as W (E, out, in)."""
        return weight.mT if self.transposed else weight

    def stored(self, w_EOI: Tensor) -> Tensor:
        """Give W (E, out, in) the shape of the parameter."""
        return w_EOI.mT.contiguous() if self.transposed else w_EOI


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """The stacked experts among a module's own parameters, by name; none where it does not say how they lie.

    In transformers 5 a module of experts says so by its attribute `is_transposed`.
    """
    transposed = getattr(module, "is_transposed", None)
    if not isinstance(transposed, bool):
        return {}
    found = {}
    for number, (name, value) in enumerate(module._parameters.items()):
        if value is not None and value.dim() == 3 and value.is_floating_point() and value.element_size() > 1:
            count, *sides = value.shape
            out, in_ = reversed(sides) if transposed else sides
            found[name] = Experts(count, in_, out, transposed, number)
    return found


def shape_of(module: nn.Module, parameter: str = WEIGHT) -> tuple[int, ...] | None:
    """(out, in) of a layer's matrix, (experts, out, in) of stacked ones, None of anything else.

    >>> shape_of(nn.Linear(3, 5))
    (5, 3)
    """
    if parameter == WEIGHT:
        layout = layout_of(module)
        return None if layout is None else (layout.out_features, layout.in_features)
    experts = experts_of(module).get(parameter)
    return None if experts is None else (experts.count, experts.out_features, experts.in_features)
