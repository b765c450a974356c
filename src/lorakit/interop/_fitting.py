"""Whether the tensors of one layer's update fit each other, whatever file they stand in.

Legend: R rank, O out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorakit.core.values import Value

_WORDS = {"magnitude": "a magnitude", "shift": "a bias of B", "diagonal": "a diagonal"}


def misfit(layer: Mapping[str, Value], dimensions: Collection[int]) -> str:
    """Why a layer's `a`, `b`, `magnitude`, `shift` and `diagonal` are no update; "" where they are.

    A has one of these numbers of dimensions; B (O, R), of a convolution with ones after it.

    >>> import torch; from lorakit.core.values import value_of
    >>> misfit({"a": value_of(torch.ones(2, 4)), "b": value_of(torch.ones(6, 3))}, (2,))
    'has A (2, 4) and B (6, 3), which do not fit each other'
    """
    a, b = layer.get("a"), layer.get("b")
    if a is None or b is None:
        return f"lacks its {'A' if a is None else 'B'}"
    if len(a.shape) not in dimensions or b.shape[1:] != (a.shape[0], *[1] * (len(a.shape) - 2)):
        return f"has A {a.shape} and B {b.shape}, which do not fit each other"
    if not a.numel or not b.numel:
        return f"has A {a.shape} and B {b.shape}, one of them without numbers"
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        return f"has A of {a.dtype} and B of {b.dtype}, which are no real numbers"
    wanted = {"magnitude": b.shape[0], "shift": b.shape[0], "diagonal": a.shape[0]}
    odd = [key for key, count in wanted.items() if key in layer and layer[key].numel != count]
    if not odd:
        return ""
    of = "ranks" if odd[0] == "diagonal" else "outputs"
    return f"has {_WORDS[odd[0]]} {layer[odd[0]].shape} for {wanted[odd[0]]} {of}"
