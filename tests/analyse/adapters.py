"""Random adapters in every form, and their updates by definition, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorakit.core.exchange import Exchange, Part, Update
from lorakit.core.sites import Slice
from lorakit.core.values import value_of

LAYER = "model.layers.0.self_attn.q_proj"
FUSED = "transformer.h.1.attn.c_attn"
EXPERTS, OUT, INNER = 3, 12, 10


def update(seed: int = 0, rank: int = 3, alpha: float = 5.0, path: str = LAYER, **fields: Any) -> Update:
    """A linear layer's, (12, 10)."""
    return _drawn(seed, (rank, INNER), (OUT, rank), path=path, alpha=alpha, **fields)


def embedding(seed: int = 0, rank: int = 3) -> Update:
    return update(seed, rank, path="model.embed_tokens", form="embedding")


def convolution(seed: int = 0, rank: int = 3) -> Update:
    shapes = (rank, 2, 3, 2), (OUT, rank, 1, 1)
    return _drawn(seed, *shapes, path="unet.conv", alpha=5.0, form="convolution")


def experts(seed: int = 0, rank: int = 3) -> Update:
    shapes = (EXPERTS, rank, INNER), (EXPERTS, OUT, rank)
    return _drawn(seed, *shapes, path="model.layers.0.mlp.experts.down_proj", alpha=5.0, form="experts")


def fused(seed: int = 0, rank: int = 3, roles: tuple[str, ...] = ("attn.q", "attn.v")) -> Update:
    """A layer of q, k and v (4 units each) of which these roles have updates of their own."""
    places = {role: Slice(4 * number, 4, OUT) for number, role in enumerate(("attn.q", "attn.k", "attn.v"))}
    parts = tuple(Part(role, places[role], number * rank, rank) for number, role in enumerate(roles))
    whole = update(seed, rank * len(roles), path=FUSED, slices=parts)
    b_OR = torch.zeros(whole.b.shape)
    for part in parts:
        own = slice(part.start, part.start + rank)
        b_OR[:, own] = part.where.put(b_OR[:, own], part.where.take(whole.b.read()[:, own], 0), 0)
    return replace(whole, b=value_of(b_OR))


FORMS = (update, embedding, convolution, experts, fused)


def _drawn(
    seed: int, a: tuple[int, ...], b: tuple[int, ...], *, dtype: torch.dtype = torch.float32, **fields: Any
) -> Update:
    generator = torch.Generator().manual_seed(seed)
    own_a, own_b = (torch.randn(shape, generator=generator).to(dtype) for shape in (a, b))
    return Update(a=value_of(own_a), b=value_of(own_b), **fields)


def adapter(*updates: Update, **fields: Any) -> Exchange:
    return Exchange("peft", updates, **fields)


def delta(one: Update) -> Tensor:
    """scale · B A in the layer's own shape, from the definition."""
    a, b = one.a.read().double(), one.b.read().double()
    if one.diagonal is not None:
        a = one.diagonal.read().double() * a
    if one.form == "convolution":
        return one.scale * torch.einsum("or,rihw->oihw", b[..., 0, 0], a)
    return one.scale * (b @ a)


def deltas(of: Exchange) -> dict[str, Tensor]:
    return {each.path: delta(each) for each in of.updates}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    """Relative Frobenius distance."""
    return bool((one - other).norm() <= tolerance * other.norm().clamp(min=1e-12))
