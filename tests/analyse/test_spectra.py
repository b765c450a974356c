"""Ranks and norms of updates, what of the rank is wasted, and bounds where only the top of a spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.analyse import (
    by_layer,
    effective_between,
    effective_rank,
    numerical_rank,
    smallest_rank,
    spectra,
    stable_rank,
)
from tests.analyse.drawn import drawn, spread, update_of


def test_a_spectrum_is_that_of_the_dense_update() -> None:
    a_RI, b_OR = drawn(6, 50).float(), drawn(40, 6, seed=1).float()
    [found], delta = spectra([update_of(a_RI, b_OR, layer=3)]), b_OR.double() @ a_RI.double()
    assert torch.allclose(found.values_R, torch.linalg.svdvals(delta)[:6])
    assert found.norm == pytest.approx(float(delta.norm()))
    assert found.numerical == int(torch.linalg.matrix_rank(delta.float())) == found.rank == 6
    assert (found.layer, found.role, found.shape, found.dead) == (3, "attn.q", (40, 50), False)


def test_of_equal_values_every_rank_is_their_number() -> None:
    values = torch.full((5,), 3.0)
    assert stable_rank(values) == pytest.approx(5)
    assert effective_rank(values) == pytest.approx(5)
    assert [numerical_rank(values, (9, 9)), smallest_rank(values, 1), smallest_rank(values, 0.6)] == [5, 5, 3]


def test_ranks_know_no_scale_and_are_in_order() -> None:
    values = drawn(1, 9)[0].abs().sort(descending=True).values
    assert stable_rank(1e-30 * values) == pytest.approx(stable_rank(values))
    assert effective_rank(1e-30 * values) == pytest.approx(effective_rank(values))
    assert stable_rank(values) <= effective_rank(values) <= numerical_rank(values, (9, 9))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_the_smallest_rank_keeps_the_share_and_one_less_does_not(share: float) -> None:
    values = torch.linspace(4, 0.1, 20)
    rank, energy = smallest_rank(values, share), values.double().square()
    assert energy[:rank].sum() >= share * energy.sum() * (1 - 1e-12)
    assert energy[: rank - 1].sum() < share * energy.sum()


def test_what_is_wasted_and_what_is_dead() -> None:
    strong = torch.diag(torch.tensor([10.0, 1.1, 0.1, 0.0])).double()
    wasteful = update_of(torch.linalg.qr(drawn(4, 4))[0], strong)
    empty = update_of(drawn(4, 50), torch.zeros(40, 4))
    a_RI = torch.cat([drawn(1, 50)] * 2)
    cancelled = update_of(a_RI, torch.cat([drawn(40, 1), -drawn(40, 1) * (1 + 1e-9)], 1))
    found = spectra([wasteful, empty, cancelled])
    assert [each.wasted for each in found] == [2, 4, 1]
    assert [each.dead for each in found] == [False, True, True]
    assert (found[1].stable, found[1].effective, found[1].numerical, found[1].norm) == (0, 0, 0, 0)


def test_numbers_by_layer_and_role() -> None:
    sizes = {(4, "attn.q", ""): 1.0, (2, "attn.q", ""): 2.0, (2, "mlp.up", "[0]"): 3.0, (2, "mlp.up", "[1]"): 5.0}
    sizes[None, "head", ""] = 7.0
    updates = [
        update_of(torch.eye(1, 4), size * torch.eye(4, 1), layer, role, mark)
        for (layer, role, mark), size in sizes.items()
    ]
    found = by_layer(spectra(updates), lambda spectrum: spectrum.norm)
    assert (found.layers, found.roles) == ((2, 4, None), ("attn.q", "mlp.up", "head"))
    wanted = torch.tensor([[2.0, 4.0, math.nan], [1.0, math.nan, math.nan], [math.nan, math.nan, 7.0]])
    assert torch.equal(found.values_LT.nan_to_num(-1), wanted.double().nan_to_num(-1))
    assert by_layer([], lambda spectrum: spectrum.norm).values_LT.shape == (0, 0)


@pytest.mark.parametrize("known", [1, 3, 8, 20])
@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_the_effective_rank_lies_between_its_bounds(known: int, power: float) -> None:
    values = torch.arange(1.0, 21).double() ** -power
    low, high = effective_between(values[:known], float(values.norm()), 20)
    assert low - 1e-9 <= effective_rank(values) <= high + 1e-9
    if known == 20:
        assert low == high == pytest.approx(effective_rank(values))


def test_the_bounds_of_the_effective_rank_are_attained() -> None:
    """Among many spectra of one top and one norm none is outside; the even and the narrow rest are the bounds."""
    top, generator = torch.tensor([3.0, 2.0]).double(), torch.Generator().manual_seed(0)
    found = []
    for _ in range(500):
        rest = 2 * torch.rand(5, generator=generator, dtype=torch.float64)
        rest = rest * (7 / rest.square().sum()).sqrt()
        found += [effective_rank(torch.cat([top, rest]))] if rest.max() <= 2 else []
    low, high = effective_between(top, math.sqrt(9 + 4 + 7), 7)
    assert len(found) > 100
    assert low < min(found) < max(found) < high
    assert low == pytest.approx(effective_rank(torch.tensor([3, 2, 2, 3**0.5, 0])))
    assert high == pytest.approx(effective_rank(torch.cat([top, torch.full((5,), (7 / 5) ** 0.5).double()])))


def test_bad_input_is_said_in_a_sentence() -> None:
    for share in (0, -1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share above 0 and at most 1"):
            smallest_rank(torch.ones(2), share)
    with pytest.raises(ValueError, match="NaN"):
        spectra([update_of(drawn(4, 30) * math.nan, drawn(20, 4))])
    with pytest.raises(ValueError, match="has 3"):
        spectra([update_of(drawn(4, 30), drawn(3, 4))])


def test_a_spread_matrix_has_the_values_it_was_given() -> None:
    values = torch.tensor([5.0, 2.0, 1.0])
    assert torch.allclose(torch.linalg.svdvals(spread(7, 9, values))[:3].float(), values)
