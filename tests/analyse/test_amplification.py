"""Table 7 and figure 8: an update against the directions of its weight."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.analyse import (
    against,
    amplification,
    directions,
    expected_grid,
    grid,
    overlap,
    projected,
    random_norm,
    top,
)
from tests.analyse.drawn import drawn, spread


@pytest.mark.parametrize(("rank", "printed"), [(4, 0.02), (64, 0.33)])
def test_random_directions_hold_as_much_of_gpt3s_weight_as_the_paper_prints(rank: int, printed: float) -> None:
    """‖W_q‖_F = 61.95 and d = 12288 give 0.0202 and 0.323."""
    assert random_norm(61.95, (12288, 12288), rank) == pytest.approx(61.95 * rank / 12288)
    assert random_norm(61.95, (12288, 12288), rank) == pytest.approx(printed, abs=0.01)


def test_the_law_of_random_directions() -> None:
    """E ‖Uᵀ W V‖_F² = ‖W‖_F² r² / (out in), whatever W's own spectrum is."""
    weight, rank = spread(48, 36, torch.arange(1.0, 37) ** -1), 6
    frames = [torch.linalg.qr(drawn(84, rank, seed))[0] for seed in range(400)]
    frames = [(torch.linalg.qr(both[:48])[0], torch.linalg.qr(both[48:])[0]) for both in frames]
    found = sum(float((u.T @ weight @ v).square().sum()) for u, v in frames) / len(frames)
    assert math.sqrt(found) == pytest.approx(random_norm(float(weight.norm()), (48, 36), rank), rel=0.05)


def test_a_weights_own_directions_hold_its_largest_values() -> None:
    weight = drawn(24, 32)
    values = torch.linalg.svdvals(weight)
    assert projected(weight, weight, 5) == pytest.approx(math.sqrt(float(values[:5].square().sum())))
    assert amplification(weight, 3 * weight, 24) == pytest.approx(3)


def test_amplification_of_the_paper() -> None:
    """6.91 / 0.32 is about 21.5 at rank 4: an update along weak directions is a large amplification."""
    left, right = torch.linalg.qr(drawn(32, 32))[0], torch.linalg.qr(drawn(32, 32, seed=1))[0]
    values = torch.linspace(10, 0.1, 32, dtype=torch.float64)
    weight = left @ torch.diag(values) @ right.T
    weak = 6.91 * left[:, -4:] @ torch.diag(torch.full((4,), 0.5, dtype=torch.float64)) @ right[:, -4:].T
    assert amplification(weight, weak, 4) == pytest.approx(6.91 / float(values[-4:].norm()), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 4, None])
def test_a_row_of_table_7_from_thin_factors_is_that_of_dense_matrices(rank: int | None) -> None:
    weight, a_RI, b_OR = drawn(24, 32), drawn(4, 32, seed=1), drawn(24, 4, seed=2)
    delta, count = b_OR @ a_RI, rank or 4
    found = against(weight, directions((a_RI, b_OR)), top(weight, 4), rank)
    assert found.update == pytest.approx(projected(weight, delta, count))
    assert found.own == pytest.approx(projected(weight, weight, count))
    assert found.amplification == pytest.approx(amplification(weight, delta, count))
    assert (found.weight_norm, found.update_norm) == pytest.approx((float(weight.norm()), float(delta.norm())))
    by_products = against(lambda v_IR: weight @ v_IR, directions((a_RI, b_OR)), top(weight, 4), rank)
    assert by_products.update == pytest.approx(found.update)


def test_the_scale_of_the_update_counts() -> None:
    weight, a_RI, b_OR = drawn(24, 32), drawn(4, 32, seed=1), drawn(24, 4, seed=2)
    once, twice = (against(weight, directions((a_RI, s * b_OR)), top(weight, 4)) for s in (1, 2))
    assert twice.amplification == pytest.approx(2 * once.amplification)
    assert twice.update == pytest.approx(once.update)


def test_what_the_weight_has_nothing_of_is_amplified_without_bound() -> None:
    weight = torch.diag(torch.tensor([1.0, 0.0]))
    found = against(weight, directions((torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]))), top(weight, 1))
    assert found.amplification == math.inf


def test_figure_8_holds_the_top_of_w_against_the_update() -> None:
    weight, update = drawn(24, 32), directions((drawn(4, 32, seed=1), drawn(24, 4, seed=2)))
    left, _, right = torch.linalg.svd(weight)
    found = overlap(top(weight, 6), update)
    assert torch.allclose(found["left"][0], grid(left[:, :6], update.left_OR))
    assert torch.allclose(found["right"][0], grid(right[:6].T, update.right_IR))
    assert torch.equal(found["left"][1], expected_grid(6, 4, 24))
    assert torch.equal(found["right"][1], expected_grid(6, 4, 32))


def test_an_update_of_another_base_is_refused() -> None:
    weight, update = drawn(24, 32), directions((drawn(4, 30), drawn(24, 4)))
    with pytest.raises(ValueError, match="an update 24 x 30 cannot be held against a weight 24 x 32"):
        against(weight, update, top(weight, 4))
    with pytest.raises(ValueError, match="24 x 30"):
        overlap(top(weight, 4), update)
    with pytest.raises(ValueError, match="5 directions are asked of a matrix that has 4"):
        against(weight, directions((drawn(4, 32), drawn(24, 4))), top(weight, 8), 5)
    with pytest.raises(ValueError, match="NaN"):
        against(weight * torch.nan, directions((drawn(4, 32), drawn(24, 4))), top(weight, 4))
