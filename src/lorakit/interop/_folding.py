"""A number folded into B, for formats that have no word for it, and how exact that is.

Legend: R rank, O out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorakit.core.exchange import Update
from lorakit.core.values import Value

_EXACT = (torch.float32, torch.float64)
_RANGE = (*_EXACT, torch.bfloat16)  # dtypes in which a power of two changes only exponents, of small numbers too


def folded(update: Update, factor: float) -> Value:
    """factor · B Λ, in float32 where the file's dtype could not hold it exactly."""
    dtype = update.b.dtype if _is_exact(update, factor) or update.b.dtype in _EXACT else torch.float32
    return update.b.then(lambda b_OR: _product(update, factor, b_OR).to(dtype), dtype=dtype)


def _is_exact(update: Update, factor: float) -> bool:
    """Whether only exponents change."""
    is_whole = factor == 1 or update.b.dtype in _RANGE
    return is_whole and update.diagonal is None and abs(math.frexp(factor)[0]) in (0.0, 0.5)


def _product(update: Update, factor: float, b_OR: Tensor) -> Tensor:
    product_OR = b_OR.double() * factor
    return product_OR if update.diagonal is None else product_OR * update.diagonal.read().double().flatten()


def error(update: Update, factor: float) -> float:
    """‖B' - factor · B Λ‖ / ‖factor · B Λ‖: how exact the folded B' is.

    >>> from lorakit.core.values import value_of
    >>> error(Update("q", value_of(torch.ones(2, 3)), value_of(torch.ones(3, 2)), alpha=4.0), 2.0)
    0.0
    """
    exact_OR = _product(update, factor, update.b.read())
    length = float(exact_OR.norm())
    return float((folded(update, factor).read().double() - exact_OR).norm()) / length if length else 0.0
