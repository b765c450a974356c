"""loralib's fused layers and convolutions as plain products B A, and back: numbers are moved, not computed.

Legend: R rank, I in, O out, P parts adapted, S slots for parts, W width of a part, K kernel, C channels, N = R K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.core.exchange import Part, Update
from lorakit.core.sites import Slice
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile


class Stored(NamedTuple):
    """A layer as loralib stores it: its matrices, the r of its constructor, and of a fused layer its enable_lora."""

    path: str
    a: Tensor
    b: Tensor
    rank: int
    enabled: tuple[bool, ...] = (True,)


def fused(path: str, a: Value, b: Value, alpha: float, enabled: Sequence[bool]) -> Update:
    """A MergedLinear, A (P R, I) and B (P W, R), as B (S W, P R) with zeros where a part has no say."""
    slots = [number for number, is_on in enumerate(enabled) if is_on]
    rank, width = b.shape[1], b.shape[0] // len(slots)
    out = width * len(enabled)
    parts = tuple(
        Part(f"part {slot}", Slice(slot * width, width, out), number * rank, rank) for number, slot in enumerate(slots)
    )
    whole = b.then(lambda b_PWR: _spread(b_PWR, enabled), (out, len(slots) * rank))
    return Update(path, a, whole, alpha * len(slots), slices=parts)


def _spread(b_PWR: Tensor, enabled: Sequence[bool]) -> Tensor:
    """B (P W, R) as (S W, P R).

    >>> _spread(torch.tensor([[1], [2]]), (True, False, True)).tolist()
    [[1, 0], [0, 0], [0, 2]]
    """
    parts = iter(b_PWR.unflatten(0, (sum(enabled), -1)))
    empty = b_PWR.new_zeros(len(b_PWR) // sum(enabled), 0)
    return torch.block_diag(*(next(parts) if is_on else empty for is_on in enabled))


def unfused(update: Update) -> Stored:
    """A linear layer as loralib stores it: a MergedLinear where its parts are such, otherwise a Linear."""
    a_RI, b_OR = update.a.read(), update.b.read()
    parts = sorted(update.slices, key=lambda part: part.start)
    if parts:
        out, width, rank = len(b_OR), parts[0].where.width, update.rank // len(parts)
        slots = [part.where.start // width for part in parts]
        enabled = tuple(slot in slots for slot in range(out // width))
        own = [part.where.take(b_OR[:, part.start : part.start + part.rank], 0) for part in parts]
        if sum(enabled) == len(parts) and all(each.shape == (width, rank) for each in own):
            b_PWR = torch.cat(own)
            if torch.equal(_spread(b_PWR, enabled), b_OR):
                return Stored(update.path, a_RI, b_PWR, rank, enabled)
    return Stored(update.path, a_RI, b_OR, update.rank)


def convolution(path: str, a: Value, b: Value, alpha: float, shape: tuple[int, int, int]) -> Update:
    """A Conv2d's A (N, C K) and B (O K, N) as a convolution; `shape` is (O, C, K).

    (B A)[oK + q, j] is number q C K + j of the kernel of output o, so B is (O, K N) as it stands, and A has K blocks.
    """
    out, channels, k = shape
    rank, most = k * a.shape[0], min(out, channels * k * k)
    if rank > most:
        return _whole(path, a, b, alpha * k / a.shape[0], shape)
    blocks = a.then(lambda a_NI: torch.block_diag(*[a_NI] * k).reshape(rank, channels, k, k), (rank, channels, k, k))
    return Update(
        path, blocks, b.then(lambda t: t.reshape(out, rank, 1, 1), (out, rank, 1, 1)), alpha * k * k, form="convolution"
    )


def _whole(path: str, a: Value, b: Value, scale: float, shape: tuple[int, int, int]) -> Update:
    """The kernel itself, rounded once to float32 or better, and an identity on its smaller side."""
    out, channels, k = shape
    dtype, inner = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype)), channels * k * k
    rank = min(out, inner)

    def kernel() -> Tensor:
        return (b.read().double() @ a.read().double()).to(dtype).reshape(out, inner)

    def one() -> Tensor:
        return torch.eye(rank, dtype=dtype)

    left, right = (one, kernel) if out <= inner else (kernel, one)
    return Update(
        path,
        Value((rank, channels, k, k), dtype, lambda: right().reshape(rank, channels, k, k)),
        Value((out, rank, 1, 1), dtype, lambda: left().reshape(out, rank, 1, 1)),
        scale * rank,
        form="convolution",
    )


def flat(update: Update) -> Stored:
    """A convolution as loralib's Conv2d: what `convolution` made comes back, any other keeps its rank.

    Raises:
        BadAdapterFile: the kernel is not square, which loralib does not know.
    """
    rank, channels, *kernel = update.a.shape
    if len(kernel) != 2 or kernel[0] != kernel[1]:
        told = " x ".join(map(str, kernel))
        raise BadAdapterFile("the adapter", [f"{update.path} has a kernel {told}; loralib's are square"])
    k = kernel[1]
    a_RI, b_OR = update.a.read().flatten(1), update.b.read().flatten(1)
    block = a_RI[: rank // k, : channels * k]
    if rank % (k * k) == 0 and torch.equal(torch.block_diag(*[block] * k), a_RI):
        return Stored(update.path, block, b_OR.reshape(-1, rank // k), rank // (k * k))
    one = torch.eye(k, dtype=b_OR.dtype)
    return Stored(update.path, a_RI.reshape(rank * k, channels * k), torch.kron(b_OR, one), rank)
