"""What an update does with the directions of its weight (Hu et al. 2021, table 7 and figure 8).

ΔW is always the effective one, with its scale alpha / rank; the paper does not say which it takes.

Legend: I in, O out, R rank, M and N numbers of directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.analyse.randomised import Top, Weight, product
from lorakit.analyse.subspace import Frames, expected_grid, finite, grid, refuse_above
from lorakit.errors import NotComparable

Products = Callable[[Tensor], Tensor]  # V (I, R) -> W V (O, R), in float64


@dataclass(frozen=True)
class Against:
    """A column of table 7: ‖Uᵀ W V‖_F for the `rank` top directions of ΔW, of W itself, and for random ones."""

    rank: int
    update: float
    own: float  # the root of the sum of W's largest σ²
    random: float
    weight_norm: float  # ‖W‖_F
    update_norm: float  # ‖ΔW‖_F, of the whole update

    @property
    def amplification(self) -> float:
        """‖ΔW‖_F / ‖Uᵀ W V‖_F: how much ΔW strengthens what W has in its directions; infinite where W has nothing."""
        return self.update_norm / self.update if self.update else math.inf


def against(weight: Weight | Products, update: Frames, own: Top, rank: int | None = None) -> Against:
    """Table 7 for one matrix, at `rank` or all of the update's directions; of W, W V (out, R) alone is needed.

    Raises:
        NotComparable: matrices of different shapes, more directions than either has, or NaN.

    >>> from lorakit.analyse.randomised import top
    >>> from lorakit.analyse.subspace import directions
    >>> weight_OI = torch.diag(torch.tensor([4.0, 3.0]))
    >>> update = directions((torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [6.0]])))
    >>> found = against(weight_OI, update, top(weight_OI, 1))
    >>> found.update, found.own, found.random, found.amplification
    (3.0, 4.0, 2.5, 2.0)
    """
    rank = len(update.values_R) if rank is None else rank
    refuse_above(rank, min(len(update.values_R), len(own.values_R)))
    _refuse_other_shapes(own, update)
    right_IR = update.right_IR[:, :rank]
    image_OR = weight(right_IR) if callable(weight) else product(weight, right_IR)
    inside = float(finite(update.left_OR[:, :rank].T @ image_OR).norm())
    top_norm = float(own.values_R[:rank].norm())
    return Against(rank, inside, top_norm, random_norm(own.norm, own.shape, rank), own.norm, update.norm)


def random_norm(norm: float, shape: tuple[int, int], rank: int) -> float:
    """‖W‖_F rank / sqrt(out in): the root of the mean of ‖Uᵀ W V‖_F² over random subspaces, exactly.

    >>> round(random_norm(61.95, (12288, 12288), 4), 4), round(random_norm(61.95, (12288, 12288), 64), 3)
    (0.0202, 0.323)
    """
    return norm * rank / math.sqrt(math.prod(shape))


def overlap(own: Top, update: Frames) -> dict[str, tuple[Tensor, Tensor]]:
    """Figure 8: φ (M, N) of W's M strongest directions with the update's N, left and right, each with E φ beside it.

    The paper takes a tenth of W's directions: `top(weight, min(shape) // 10)`.

    Raises:
        NotComparable: matrices of different shapes.

    >>> from lorakit.analyse.randomised import top
    >>> from lorakit.analyse.subspace import directions
    >>> update = directions((torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [6.0]])))
    >>> shared, by_chance = overlap(top(torch.diag(torch.tensor([4.0, 3.0])), 2), update)["right"]
    >>> shared.tolist(), by_chance.tolist()
    ([[0.0], [1.0]], [[0.5], [1.0]])
    """
    _refuse_other_shapes(own, update)
    pairs = {"left": (own.left_OR, update.left_OR), "right": (own.right_IR, update.right_IR)}
    return {
        side: (grid(one, other), expected_grid(one.shape[1], other.shape[1], len(one)))
        for side, (one, other) in pairs.items()
    }


def projected(weight_OI: Tensor, other_OI: Tensor, rank: int) -> float:
    """‖Uᵀ W V‖_F, with U and V the top left and right singular directions of another: W's part in them.

    With W's own directions it is the root of the sum of its `rank` largest squared singular values; with random ones
    about ‖W‖_F rank / sqrt(out in).

    >>> projected(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2), 2)
    5.0
    """
    left_OR, _, right_RI = torch.linalg.svd(finite(other_OI), full_matrices=False)
    refuse_above(rank, len(right_RI))
    return float((left_OR[:, :rank].T @ finite(weight_OI) @ right_RI[:rank].T).norm())


def amplification(weight_OI: Tensor, delta_OI: Tensor, rank: int) -> float:
    """How much ΔW strengthens directions that W already has: ‖ΔW‖_F / ‖Uᵀ W V‖_F (Hu et al. 2021, section 7.3)."""
    return float(delta_OI.double().norm()) / projected(weight_OI, delta_OI, rank)


def _refuse_other_shapes(own: Top, update: Frames) -> None:
    shape = len(update.left_OR), len(update.right_IR)
    if shape != own.shape:
        raise NotComparable(
            f"an update {shape[0]} x {shape[1]} cannot be held against a weight {own.shape[0]} x {own.shape[1]}; "
            "take the base that the adapter was trained on"
        )
