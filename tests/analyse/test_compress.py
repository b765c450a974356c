"""Smaller adapters: nothing is lost where the rank allows, what is lost is told, budgets are kept and spent well."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from lorakit.analyse.compress import Compressed, compress
from lorakit.analyse.ranks import at_most, keeping, within_parameters, within_ranks
from lorakit.core.exchange import Exchange, Update, factored
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, BadMethod
from tests.analyse.adapters import EXPERTS, FORMS, FUSED, adapter, close, delta, deltas, experts, fused, update

DEAD = replace(update(9, path="dead"), b=value_of(torch.zeros(12, 3)))


def padded(one: Update, more: int = 2) -> Update:
    """The same update at a rank that is too large: rows of A that B does not use."""
    dim = 1 if one.form == "experts" else 0
    a, b = one.a.read(), one.b.read()
    shape = list(a.shape)
    shape[dim] = more
    wide = torch.cat([b, torch.zeros_like(b.narrow(dim + 1, 0, more))], dim + 1)
    rank = one.rank + more
    longer = torch.cat([a, torch.ones(shape)], dim)
    return replace(one, a=value_of(longer), b=value_of(wide), alpha=one.scale * rank)


def strong(path: str, *values: float, out: int = 12, inner: int = 10) -> Update:
    """An update of these singular values."""
    rank, generator = len(values), torch.Generator().manual_seed(len(path))
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in (out, inner))
    return Update(path, value_of(right.T.contiguous()), value_of(left * torch.tensor(values)), alpha=float(rank))


def ranks(found: Compressed) -> dict[str, int]:
    return {each.name: each.rank for each in found.matrices}


def error(before: Exchange, after: Exchange) -> float:
    """The relative distance of all updates together, from the whole matrices."""
    was, new = deltas(before), deltas(after)
    parts = [(was[path] - new.get(path, torch.zeros(()))).norm() for path in was]
    return math.hypot(*map(float, parts)) / math.hypot(*(float(each.norm()) for each in was.values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choose", [keeping(1.0), at_most(5), within_ranks(99), within_parameters(10**6)])
def test_nothing_is_lost_where_the_rank_allows(form: Any, choose: Any) -> None:
    whole = form()
    found = compress(adapter(whole), choose)
    (new,) = found.exchange.updates
    assert close(delta(new), delta(whole)) and found.lost < 1e-6
    assert (new.form, new.rank, new.scale, new.rooted) == (whole.form, whole.rank, 1, False)
    assert (new.a.shape, new.b.shape) == (whole.a.shape, whole.b.shape)
    assert not found.dropped and found.parameters[0] == found.parameters[1]


@pytest.mark.parametrize("form", [form for form in FORMS if form is not fused])
def test_rank_that_is_not_used_goes(form: Any) -> None:
    whole = padded(form())
    found = compress(adapter(whole), keeping(1.0))
    assert close(delta(whole), delta(form())) and close(delta(found.exchange.updates[0]), delta(whole))
    assert found.exchange.updates[0].rank == form().rank == whole.rank - 2
    assert found.parameters[1] * whole.rank == found.parameters[0] * form().rank


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_is_kept_with_the_smallest_rank_that_does(share: float) -> None:
    whole = adapter(*(update(seed, 6, path=f"layers.{seed}") for seed in range(3)))
    found = compress(whole, keeping(share))
    for before, after, matrix in zip(whole.updates, found.exchange.updates, found.matrices, strict=True):
        energies = torch.linalg.svdvals(delta(before)).square()
        kept = [float(energies[:rank].sum() / energies.sum()) for rank in range(7)]
        assert kept[matrix.rank] >= share > kept[matrix.rank - 1]
        assert matrix.lost == pytest.approx(math.sqrt(1 - kept[matrix.rank]), rel=1e-4, abs=1e-6)
        assert float((delta(after) - delta(before)).norm() / delta(before).norm()) == pytest.approx(
            matrix.lost, rel=1e-4
        )
        assert matrix.lost <= math.sqrt(1 - share) * (1 + 1e-6)
    assert found.lost == pytest.approx(error(whole, found.exchange), rel=1e-4)


def test_one_rank_for_all_is_the_nearest_of_that_rank() -> None:
    whole = adapter(update(0, 6), update(1, 1, path="small"))
    found = compress(whole, at_most(2))
    values = torch.linalg.svdvals(delta(whole.updates[0]))
    assert ranks(found) == {whole.updates[0].path: 2, "small": 1}
    assert found.matrices[0].lost == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-5)


def test_factors_are_balanced() -> None:
    (new,) = compress(adapter(update(0, 4)), at_most(3)).exchange.updates
    a, b, values = new.a.read().double(), new.b.read().double(), torch.linalg.svdvals(delta(update(0, 4)))[:3]
    assert torch.allclose(a @ a.T, values.diag(), atol=1e-4)
    assert torch.allclose(b.T @ b, values.diag(), atol=1e-4)


@pytest.mark.parametrize("total", range(1, 9))
def test_a_number_of_ranks_goes_where_it_leaves_the_least_error(total: int) -> None:
    whole = adapter(strong("a", 9.0, 4.0, 1.0), strong("bb", 8.0, 0.5), strong("ccc", 5.0, 3.0, 2.0))
    found = compress(whole, within_ranks(total))
    assert sum(ranks(found).values()) == total
    best = math.inf
    for choice in product(range(4), range(3), range(4)):
        if sum(choice) == total:
            left = [torch.linalg.svdvals(delta(u))[r:].norm() for u, r in zip(whole.updates, choice, strict=True)]
            best = min(best, math.hypot(*map(float, left)))
    norm = math.hypot(*(float(delta(each).norm()) for each in whole.updates))
    assert found.lost == pytest.approx(best / norm, rel=1e-4, abs=1e-6)
    assert set(found.dropped) == {"a", "bb", "ccc"} - ranks(found).keys()


@pytest.mark.parametrize("total", [22, 60, 100, 250])
def test_a_number_of_parameters_is_a_limit_that_leaves_no_room_for_more(total: int) -> None:
    whole = adapter(strong("a", 9.0, 4.0, 1.0), strong("bb", 30.0, 20.0, out=40, inner=40), update(0, 5))
    found = compress(whole, within_parameters(total))
    assert 0 < found.parameters[1] <= total
    assert sum(value.numel for value in found.exchange.values) == found.parameters[1]
    room = [sum(each.shape) for each in factored(whole) if ranks(found).get(each.name, 0) < each.rank]
    assert all(cost > total - found.parameters[1] for cost in room)


def test_parameters_go_where_each_of_them_adds_most() -> None:
    """9² / 22 is more than 12² / 80 for each number, and both no longer fit."""
    whole = adapter(strong("a", 9.0), strong("bb", 12.0, out=40, inner=40))
    assert ranks(compress(whole, within_parameters(90))) == {"a": 1}
    assert ranks(compress(whole, within_ranks(1))) == {"bb": 1}
    assert ranks(compress(whole, within_parameters(102))) == {"a": 1, "bb": 1}


def test_stacked_experts_share_a_rank_and_are_paid_for_together() -> None:
    whole = experts(0, 4)
    b = whole.b.read()
    b[1] = 0
    b[2, :, 1:] = 0
    uneven = adapter(replace(whole, b=value_of(b)))
    found = compress(uneven, at_most(2))
    assert [each.rank for each in found.matrices] == [2] * EXPERTS
    assert found.exchange.updates[0].a.shape == (EXPERTS, 2, 10)
    assert [each.lost < 1e-6 for each in found.matrices] == [False, True, True]
    full = compress(uneven, keeping(1.0))
    assert full.exchange.updates[0].rank == 4 and close(delta(full.exchange.updates[0]), delta(uneven.updates[0]))
    assert compress(uneven, within_ranks(2 * EXPERTS)).exchange.updates[0].rank == 2
    assert compress(uneven, within_parameters(EXPERTS * 22)).exchange.updates[0].rank == 1


def test_the_roles_of_a_fused_layer_have_ranks_of_their_own() -> None:
    whole = fused(0)
    b = whole.b.read()
    b[8:] *= 100  # v's
    found = compress(adapter(replace(whole, b=value_of(b))), within_ranks(4))
    assert ranks(found) == {f"{FUSED}[attn.q]": 1, f"{FUSED}[attn.v]": 3}
    (new,) = found.exchange.updates
    assert new.rank == 4 and not delta(new)[4:8].any()
    alone = compress(adapter(replace(whole, b=value_of(b))), within_ranks(2))
    assert ranks(alone) == {f"{FUSED}[attn.v]": 2} and alone.dropped == (f"{FUSED}[attn.q]",)
    kept = delta(alone.exchange.updates[0])
    assert kept[8:].any() and not kept[:8].any()


def test_the_files_dtype_is_kept_and_its_rounding_told() -> None:
    half = adapter(update(0, dtype=torch.bfloat16))
    found = compress(half, keeping(1.0))
    assert {value.dtype for value in found.exchange.values} == {torch.bfloat16}
    assert 1e-4 < found.lost == pytest.approx(error(half, found.exchange), rel=1e-5)
    exact = compress(half, keeping(1.0), torch.float32)
    assert {value.dtype for value in exact.exchange.values} == {torch.float32} and exact.lost < 1e-6


def test_what_is_not_low_rank_stays() -> None:
    head = {"score.weight": value_of(torch.ones(3, dtype=torch.float64))}
    shifted = update(0, 4, alpha=2.0, rooted=True, shift=value_of(torch.arange(12.0)))
    dead = replace(DEAD, shift=value_of(torch.ones(12)))
    whole = adapter(shifted, dead, whole=head, base="some/base", task="SEQ_CLS", config={"r": 4}, header={"plan": []})
    found = compress(whole, at_most(2)).exchange
    assert torch.equal(found.whole["score.weight"].read(), head["score.weight"].read())
    assert (found.base, found.task, found.config, found.header) == ("some/base", "SEQ_CLS", {}, None)
    for before, after in zip(whole.updates, found.updates, strict=True):
        assert before.shift is not None and after.shift is not None
        assert torch.allclose(after.scale * after.shift.read(), before.scale * before.shift.read())
    assert not delta(found.updates[1]).any()


def test_adaloras_singular_values_are_folded_in() -> None:
    pruned = update(0, 4, diagonal=value_of(torch.tensor([[2.0], [0.0], [-1.0], [0.5]])))
    found = compress(adapter(pruned), keeping(1.0))
    assert found.exchange.updates[0].rank == 3 and found.exchange.updates[0].diagonal is None
    assert close(delta(found.exchange.updates[0]), delta(pruned))


def test_dead_updates_go_and_an_adapter_of_nothing_else_is_refused() -> None:
    found = compress(adapter(update(0), DEAD), keeping(0.9))
    assert found.dropped == ("dead",) and [each.path for each in found.exchange.updates] == [update(0).path]
    with pytest.raises(BadMethod, match="nothing would be left of mine"):
        compress(adapter(DEAD), keeping(0.9), where="mine")
    with pytest.raises(BadMethod, match="nothing would be left"):
        compress(adapter(update(0)), within_parameters(21))


def test_the_same_bytes_each_time() -> None:
    one, two = (compress(adapter(update(0), fused(1)), keeping(0.9)).exchange for _ in range(2))
    assert all(torch.equal(x.read(), y.read()) for x, y in zip(one.values, two.values, strict=True))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_shares_are_above_zero_and_at_most_one(share: float) -> None:
    with pytest.raises(BadMethod, match="no rank keeps"):
        keeping(share)


@pytest.mark.parametrize(("choose", "what"), [(at_most, "rank"), (within_ranks, "ranks"), (within_parameters, "param")])
def test_numbers_are_one_or_more(choose: Any, what: str) -> None:
    with pytest.raises(BadMethod, match=f"to 0 {what}"):
        choose(0)


def test_a_layer_that_is_changed_twice_is_refused() -> None:
    with pytest.raises(BadAdapterFile, match=r"^mine cannot.*q_proj twice"):
        compress(adapter(update(0), update(1)), keeping(0.9), where="mine")


def test_dora_is_refused_by_name() -> None:
    with pytest.raises(BadAdapterFile, match=r"^mine cannot.*DoRA"):
        compress(adapter(update(0, magnitude=value_of(torch.ones(12)))), keeping(0.9), where="mine")


def test_what_is_written_is_read_as_the_same_matrices() -> None:
    found = compress(adapter(update(0, 5), fused(1), experts(2)), at_most(2))
    for each, again in zip(found.matrices, factored(found.exchange), strict=True):
        assert (each.name, each.rank, each.shape) == (again.name, again.rank, again.shape)
        assert all(map(torch.equal, each.read(), again.read()))
