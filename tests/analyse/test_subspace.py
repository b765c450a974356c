"""The laws of subspace similarity, and the figures that random subspaces have."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.analyse import amplification, projected, similarity


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_subspace_is_wholly_its_own_and_sides_do_not_matter() -> None:
    one, other = drawn(8, 64), drawn(16, 64, seed=1)
    for i in range(1, 9):
        assert similarity(one, one, i, i) == pytest.approx(1)
        for j in (1, 5, 16):
            assert similarity(one, other, i, j) == pytest.approx(similarity(other, one, j, i))
            assert 0 <= similarity(one, other, i, j) <= 1


def test_rotating_the_rows_changes_nothing() -> None:
    one, other = drawn(8, 64), drawn(8, 64, seed=1)
    rotation, invertible = torch.linalg.qr(drawn(8, 8, seed=2))[0], drawn(8, 8, seed=3)
    for i, j in ((1, 8), (3, 2), (8, 8)):
        assert similarity(rotation @ one, other, i, j) == pytest.approx(similarity(one, other, i, j))
    assert similarity(invertible @ one, other, 8, 8) == pytest.approx(similarity(one, other, 8, 8))


def test_it_is_the_projection_metric_in_other_words() -> None:
    one, other, i, j = drawn(8, 64), drawn(16, 64, seed=1), 4, 9
    u, v = (torch.linalg.svd(matrix)[2][:count].T for matrix, count in ((one, i), (other, j)))
    cosines = torch.linalg.svdvals(u.T @ v)
    distance_squared = min(i, j) - float(cosines.square().sum())
    assert similarity(one, other, i, j) == pytest.approx(1 - distance_squared / min(i, j))


@pytest.mark.parametrize(("i", "j"), [(1, 64), (8, 64), (8, 8)])
def test_random_subspaces_share_max_i_j_of_k(i: int, j: int) -> None:
    """E φ = max(i, j) / k: 64 / 768 = 0.0833 for the paper's ranks 8 and 64 in RoBERTa-base's width."""
    found = [similarity(drawn(8, 768, seed=2 * n), drawn(64, 768, seed=2 * n + 1), i, j) for n in range(12)]
    assert sum(found) / len(found) == pytest.approx(max(i, j) / 768, rel=0.25 if i > 1 else 0.5)


@pytest.mark.parametrize(("rank", "published"), [(4, 0.02), (64, 0.33)])
def test_random_directions_hold_as_much_of_gpt3s_weight_as_the_paper_prints(rank: int, published: float) -> None:
    """‖W_q‖_F = 61.95 and d = 12288 give 0.0202 and 0.323; checked here by draws in a smaller space."""
    assert 61.95 * rank / 12288 == pytest.approx(published, abs=0.01)
    width, weight = 96, drawn(96, 96)
    found = [projected(weight, drawn(width, width, seed=n + 1), 8) for n in range(20)]
    assert sum(found) / len(found) == pytest.approx(float(weight.norm()) * 8 / width, rel=0.1)


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


@pytest.mark.parametrize("count", [0, 9])
def test_more_directions_than_there_are_cannot_be_asked(count: int) -> None:
    with pytest.raises(ValueError, match="8"):
        similarity(drawn(8, 64), drawn(8, 64), count, 8)
