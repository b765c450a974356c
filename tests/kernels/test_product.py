"""The faster product is PyTorch's own to the rounding, whatever the strides, and stands aside where it does not fit."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.product import along_last, frozen_linear, product, takes


def laid_out(rows: int, columns: int, how: str) -> Tensor:
    """Random numbers of one shape, in memory as `how` says."""
    if how == "transposed":
        return torch.randn(columns, rows).T
    if how == "part":
        return torch.randn(rows + 3, columns + 2)[2:-1, 1:-1]
    if how == "every other":
        return torch.randn(2 * rows, 2 * columns)[::2, ::2]
    if how == "one row":
        return torch.randn(columns).expand(rows, columns)
    return torch.randn(rows, columns)


LAYOUTS = ("rows", "transposed", "part", "every other", "one row")


@pytest.mark.parametrize(("of_x", "of_w"), itertools.product(LAYOUTS, LAYOUTS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (5, 1, 3), (33, 64, 8), (8, 70, 129)])
def test_the_product_is_that_of_float64(shape: tuple[int, int, int], of_x: str, of_w: str) -> None:
    torch.manual_seed(0)
    tokens, inner, out = shape
    x, w, bias = laid_out(tokens, inner, of_x), laid_out(out, inner, of_w), torch.randn(out)
    assert takes(x, w)
    before = x.clone(), w.clone()
    for b in (None, bias):
        wanted = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert (product(x, w, b) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


def test_the_same_call_gives_the_same_bits() -> None:
    x, w = torch.randn(300, 576), torch.randn(576, 576)
    assert torch.equal(product(x, w), product(x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype) -> None:
    x, w = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    assert not takes(x, w)
    assert torch.equal(product(x, w), F.linear(x, w))


@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (2, 0, 3), (2, 5, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_that_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    x, w, b = torch.randn(shape, requires_grad=True), torch.randn(6, 3), torch.randn(6) if bias else None
    wanted, found = F.linear(x, w, b), frozen_linear(x, w, b)
    assert found.shape == wanted.shape == along_last(x, w, b).shape
    upstream = torch.randn(wanted.shape)
    (of_wanted,), (of_found,) = (torch.autograd.grad(y, x, upstream) for y in (wanted, found))
    assert torch.allclose(found, wanted, atol=1e-5) and torch.allclose(of_found, of_wanted, atol=1e-5)


def test_nothing_but_the_weight_is_kept_for_backward() -> None:
    x, w, kept = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear(x, w)
    assert [tensor.data_ptr() for tensor in kept] == [w.data_ptr()]
