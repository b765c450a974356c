"""The faster product is PyTorch's own to the rounding, whatever the strides, and stands aside where it does not fit."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.product import along_last, frozen_linear, over_tokens, product, round_number, takes


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.product._LEAST", 0)


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


@pytest.mark.parametrize(("of_x", "of_w"), list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (5, 1, 3), (33, 64, 8), (67, 70, 129)])
def test_the_product_is_that_of_float64(shape: tuple[int, int, int], of_x: str, of_w: str) -> None:
    torch.manual_seed(0)
    tokens, inner, out = shape
    x, w = laid_out(tokens, inner, of_x), laid_out(out, inner, of_w)
    assert takes(x, w)
    before = x.clone(), w.clone()
    for b in (None, torch.randn(out), torch.randn(2 * out)[::2], torch.randn(1).expand(out), torch.randn(out).double()):
        if b is not None and b.dtype != x.dtype:
            with pytest.raises(RuntimeError, match="dtype"):
                product(x, w, b)
            continue
        wanted = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert (product(x, w, b) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


def test_the_same_call_gives_the_same_bits() -> None:
    x, w = torch.randn(300, 576), torch.randn(576, 576)
    assert torch.equal(product(x, w), product(x, w))


@pytest.mark.parametrize("tokens", [1, 5, 66, 67, 129])
def test_a_sum_over_tokens_is_that_of_float64(tokens: int) -> None:
    g, x = torch.randn(tokens, 3), torch.randn(tokens, 40)
    assert torch.allclose(over_tokens(g, x), (g.double().T @ x.double()).float(), atol=1e-4)


def test_any_number_of_tokens_has_a_round_one_near_it() -> None:
    found = [round_number(tokens) for tokens in range(1, 9000)]
    assert all(tokens <= rounded <= 1.04 * tokens for tokens, rounded in enumerate(found, 1))
    assert all(round_number(rounded) == rounded for rounded in found)
    assert len({rounded for rounded in found if rounded > 1024}) <= 32 * 4


GROWS = """
import psutil, torch
from lorakit.kernels.product import product
w_OI, process = torch.randn(256, 512), psutil.Process()
held = []
for tokens in range(2000, 2600):
    product(torch.ones(tokens, 512), w_OI)
    held.append(process.memory_info().rss)
print(held[-1] - held[200])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_numbers_of_tokens() -> None:
    found = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 40e6


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
