"""The laws of subspace similarity, and the figures that random subspaces have."""

from __future__ import annotations

import pytest
import torch

from lorakit.analyse import directions, expected, expected_grid, grid, random_grid, similarities, similarity
from tests.analyse.drawn import drawn, update_of


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
    assert similarity(invertible @ one, other, 3, 3) != pytest.approx(similarity(one, other, 3, 3))


def test_it_is_the_projection_metric_in_other_words() -> None:
    """φ = 1 - d² / p with p = min(i, j); appendix G prints (1 - d²) / p, which is another number."""
    one, other, i, j = drawn(8, 64), drawn(16, 64, seed=1), 4, 9
    u, v = (torch.linalg.svd(matrix)[2][:count].T for matrix, count in ((one, i), (other, j)))
    distance = torch.linalg.matrix_norm(u @ u.T - v @ v.T) ** 2  # of the projectors: i + j - 2 Σσ²
    distance_squared = (float(distance) - abs(i - j)) / 2
    assert similarity(one, other, i, j) == pytest.approx(1 - distance_squared / min(i, j))
    assert similarity(one, other, i, j) != pytest.approx((1 - distance_squared) / min(i, j), abs=0.1)


@pytest.mark.parametrize(("i", "j"), [(1, 64), (8, 64), (8, 8)])
def test_random_subspaces_share_max_i_j_of_k(i: int, j: int) -> None:
    """E φ = max(i, j) / k: 64 / 768 = 0.0833 for the paper's ranks 8 and 64 in RoBERTa-base's width."""
    found = [float(random_grid(768, i, j, seed)[-1, -1]) for seed in range(24)]
    assert sum(found) / len(found) == pytest.approx(expected(i, j, 768), rel=0.1 if i > 1 else 0.3)


def test_the_law_holds_for_all_i_and_j_at_once() -> None:
    found = torch.stack([random_grid(12, 5, 12, seed) for seed in range(600)]).mean(0)
    assert torch.allclose(found, expected_grid(5, 12, 12), atol=0.02)
    assert torch.allclose(found[:, -1], torch.ones(5).double())  # the whole space
    cells = [[expected(i, j, 12) for j in range(1, 13)] for i in range(1, 6)]
    assert expected_grid(5, 12, 12).tolist() == cells


def test_a_grid_is_every_similarity() -> None:
    one, other = drawn(5, 40), drawn(9, 40, seed=1)
    found = grid(directions((one, drawn(30, 5))).a_IR, directions((other, drawn(30, 9))).a_IR)
    each = [[similarity(one, other, i, j) for j in range(1, 10)] for i in range(1, 6)]
    assert torch.allclose(found, torch.tensor(each, dtype=torch.float64))


def test_directions_of_thin_factors_are_those_of_the_dense_update() -> None:
    a_RI, b_OR = drawn(6, 50), drawn(40, 6, seed=1)
    found, (left, values, right) = directions((a_RI, b_OR)), torch.linalg.svd(b_OR @ a_RI, full_matrices=False)
    assert torch.allclose(found.values_R, values[:6])
    assert found.norm == pytest.approx(float((b_OR @ a_RI).norm()))
    assert torch.allclose(found.left_OR * found.values_R @ found.right_IR.T, b_OR @ a_RI)
    of_a, of_b = torch.linalg.svd(a_RI, full_matrices=False)[2].T, torch.linalg.svd(b_OR, full_matrices=False)[0]
    for ours, dense in ((found.left_OR, left), (found.right_IR, right.T), (found.a_IR, of_a), (found.b_OR, of_b)):
        assert torch.allclose(ours.T @ ours, torch.eye(6).double(), atol=1e-12)
        assert torch.allclose((ours * dense[:, :6]).sum(0).abs(), torch.ones(6).double())  # equal but for signs


def test_two_updates_are_compared_in_all_four_ways() -> None:
    """ΔW does not change as B and A mix; its own directions therefore do not either, and A's do."""
    a_RI, b_OR, mixing = drawn(4, 30), drawn(20, 4, seed=1), drawn(4, 4, seed=2)
    one, other = directions((a_RI, b_OR)), directions((mixing @ a_RI, b_OR @ torch.linalg.inv(mixing)))
    found = similarities(one, other)
    for side in ("left", "right"):
        assert torch.allclose(found[side].diagonal(), torch.ones(4).double())
    for side in ("A", "B"):
        assert float(found[side][-1, -1]) == pytest.approx(1)
        assert float(found[side][0, 0]) < 0.999


def test_what_is_zero_has_no_directions() -> None:
    found = directions((drawn(4, 30), torch.zeros(20, 4)))
    assert [len(found.values_R), found.left_OR.shape[1], found.b_OR.shape[1], found.a_IR.shape[1]] == [0, 0, 0, 4]
    assert similarities(found, found)["left"].shape == (0, 0)
    repeated = drawn(20, 1).expand(20, 4)
    assert directions((drawn(4, 30), repeated)).left_OR.shape == (20, 1)


def test_a_matrix_of_an_adapter_is_read() -> None:
    a_RI, b_OR = drawn(4, 30), drawn(20, 4, seed=1)
    assert torch.allclose(directions(update_of(a_RI, b_OR)).values_R, directions((a_RI, b_OR)).values_R)


@pytest.mark.parametrize("count", [0, 9])
def test_more_directions_than_there_are_cannot_be_asked(count: int) -> None:
    with pytest.raises(ValueError, match="8"):
        similarity(drawn(8, 64), drawn(8, 64), count, 8)
    with pytest.raises(ValueError, match="8"):
        expected(count, 8, 8)


def test_what_cannot_be_compared_is_said_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="width 64 cannot be compared with those of width 65"):
        similarity(drawn(8, 64), drawn(8, 65), 2, 2)
    with pytest.raises(ValueError, match="NaN"):
        similarity(drawn(8, 64) * torch.nan, drawn(8, 64), 2, 2)
    with pytest.raises(ValueError, match="NaN"):
        directions((drawn(4, 30), drawn(20, 4) / 0))
    with pytest.raises(ValueError, match="4 directions are asked of a matrix that has 3"):
        directions((drawn(4, 30), drawn(3, 4)))
    with pytest.raises(ValueError, match=r"A \(4, 30\) and B \(20, 5\)"):
        directions((drawn(4, 30), drawn(20, 5)))
