"""Cosines and interference of two adapters, against projections of the updates themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.analyse.compare import Comparison, compare, sign_conflicts
from lorakit.core.exchange import Update, factored
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, BadMethod
from tests.analyse.adapters import FORMS, FUSED, adapter, close, delta, embedding, fused, update


def of(one: Update, other: Update) -> Comparison:
    return compare(adapter(one), adapter(other))


def remade(one: Update, factor: float = 1.0) -> Update:
    """The same update times a factor, of other factors and another scale."""
    mix = torch.randn(one.rank, one.rank, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    a = torch.linalg.inv(mix) @ one.a.read().double()
    b = factor * one.scale / 2.0 * one.b.read().double() @ mix
    return replace(one, a=value_of(a.float()), b=value_of(b.float()), alpha=2.0 * one.rank)


def projector(columns: Tensor) -> Tensor:
    q = torch.linalg.qr(columns)[0]
    return q @ q.T


def shares(mine: Tensor, theirs: Tensor, rank: int) -> tuple[float, float, float]:
    """The share of one matrix in another's column and row space, by projectors (in, in) and (out, out)."""
    left, _, right = torch.linalg.svd(theirs)
    rows, columns = projector(right[:rank].T), projector(left[:, :rank])
    parts = mine @ rows, columns @ mine, columns @ mine @ rows
    inputs, outputs, both = (float(part.norm() / mine.norm()) for part in parts)
    return inputs, outputs, both


def test_cosine_and_interference_are_those_of_the_whole_matrices() -> None:
    one, other = update(0, 3), update(1, 2, alpha=-4.0)
    first, second, found = delta(one), delta(other), of(one, other)
    (pair,) = found.pairs
    cosine = float((first * second).sum() / first.norm() / second.norm())
    assert pair.cosine == pytest.approx(cosine, rel=1e-6) and found.cosine == pytest.approx(cosine, rel=1e-6)
    assert pair.norms == pytest.approx((float(first.norm()), float(second.norm())), rel=1e-6)
    assert pair.ranks == (3, 2)
    for within, mine, theirs, rank in ((pair.one, first, second, 2), (pair.other, second, first, 3)):
        assert (within.inputs, within.outputs, within.both) == pytest.approx(shares(mine, theirs, rank), rel=1e-5)
    for kept, mine in zip(pair.in_sum, (first, second), strict=True):
        assert kept == pytest.approx(float((mine * (first + second)).sum() / mine.norm() ** 2), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_beside_itself(form: Any) -> None:
    found = of(form(), form())
    assert found.cosine == pytest.approx(1)
    assert found.in_sum == pytest.approx((2, 2))
    assert not any(found.only)
    for pair in (*found.pairs, found):
        for within in (pair.one, pair.other):
            assert (within.inputs, within.outputs, within.both) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_only_the_update_counts_not_its_factors_or_its_length(factor: float) -> None:
    one, other = update(0, 3), update(1, 3)
    before, after = of(one, other), of(remade(one, factor), other)
    assert close(delta(remade(one, factor)), factor * delta(one), 1e-5)
    assert after.cosine == pytest.approx(math.copysign(1, factor) * before.cosine, rel=1e-4)
    assert after.pairs[0].one.both == pytest.approx(before.pairs[0].one.both, rel=1e-4)
    assert after.pairs[0].other.inputs == pytest.approx(before.pairs[0].other.inputs, rel=1e-4)


def test_changing_sides_changes_sides() -> None:
    one, other = update(0, 3), update(1, 2)
    forth, back = of(one, other).pairs[0], of(other, one).pairs[0]
    assert forth.cosine == pytest.approx(back.cosine)
    assert forth.one.inputs == pytest.approx(back.other.inputs) and forth.other.both == pytest.approx(back.one.both)
    assert forth.chance == (back.chance[1], back.chance[0])


def test_updates_of_other_inputs_and_outputs_do_not_interfere() -> None:
    a, b = torch.eye(4, 10), torch.eye(12, 4)
    one = replace(update(0, 2), a=value_of(a[:2]), b=value_of(b[:, :2]))
    other = replace(one, a=value_of(a[2:]), b=value_of(b[:, 2:]))
    found = of(one, other)
    assert found.cosine == 0 and found.in_sum == (1, 1)
    assert (found.one.inputs, found.one.outputs, found.other.both) == (0, 0, 0)
    reads_the_same = replace(other, a=one.a)
    found = of(one, reads_the_same)
    assert (found.one.inputs, found.one.outputs, found.one.both) == pytest.approx((1, 0, 0))


def test_random_updates_share_what_chance_tells() -> None:
    found = [of(update(2 * n, 3), update(2 * n + 1, 2)).pairs[0] for n in range(200)]
    for name in ("inputs", "outputs", "both"):
        for side, chance in zip(("one", "other"), found[0].chance, strict=True):
            squares = [getattr(getattr(pair, side), name) ** 2 for pair in found]
            assert sum(squares) / len(squares) == pytest.approx(getattr(chance, name) ** 2, rel=0.15)
    assert sum(pair.cosine**2 for pair in found) / len(found) == pytest.approx(1 / 120, rel=0.3)


def test_totals_are_those_of_all_updates_as_one_vector() -> None:
    one = adapter(update(0, path="a"), update(1, path="b"), update(2, path="mine"))
    other = adapter(update(3, path="b"), update(4, path="a"), update(5, path="theirs"), fused(6))
    found = compare(one, other)
    assert found.only == (("mine",), (f"{FUSED}[attn.q]", f"{FUSED}[attn.v]", "theirs"))
    first, second = ({each.path: delta(each) for each in of.updates} for of in (one, other))
    inner = sum(float((first[path] * second[path]).sum()) for path in "ab")
    norms = [math.sqrt(sum(float(each.norm()) ** 2 for each in of.values())) for of in (first, second)]
    assert found.norms == pytest.approx(norms, rel=1e-6)
    assert found.cosine == pytest.approx(inner / norms[0] / norms[1], rel=1e-5)
    part = math.hypot(*(shares(first[path], second[path], 3)[0] * float(first[path].norm()) for path in "ab"))
    assert found.one.inputs == pytest.approx(part / norms[0], rel=1e-5)


def test_fused_layers_divided_in_other_ways_are_compared_whole() -> None:
    one, other = fused(0), fused(1, roles=("attn.q", "attn.k"))
    found = of(one, other)
    first, second = delta(one), delta(other)
    assert [pair.name for pair in found.pairs] == [FUSED]
    assert found.cosine == pytest.approx(float((first * second).sum() / first.norm() / second.norm()), rel=1e-5)
    assert [pair.role for pair in of(fused(0), fused(1)).pairs] == ["attn.q", "attn.v"]


def test_a_zero_update_shares_nothing() -> None:
    fresh = replace(update(0), b=value_of(torch.zeros(12, 3)))
    (pair,) = of(fresh, update(1)).pairs
    assert (pair.cosine, pair.ranks, pair.in_sum[0]) == (0, (0, 3), 0)
    assert (pair.one.inputs, pair.other.inputs, pair.chance[1].inputs) == (0, 0, 0)


def test_sign_conflicts_are_counted_where_both_change() -> None:
    one, other = update(0), update(1)
    (first,), (second,) = factored(adapter(one)), factored(adapter(other))
    wanted = float((delta(one).sign() != delta(other).sign()).double().mean())
    assert sign_conflicts(first, second) == pytest.approx(wanted) and 0.2 < wanted < 0.8
    (turned,) = factored(adapter(replace(one, alpha=-one.alpha)))
    assert (sign_conflicts(first, first), sign_conflicts(first, turned)) == (0, 1)
    (fresh,) = factored(adapter(replace(one, b=value_of(torch.zeros(12, 3)))))
    assert sign_conflicts(first, fresh) == 0


def test_adapters_that_cannot_be_compared_are_refused_with_the_difference() -> None:
    with pytest.raises(BadMethod, match=r"change no matrix in common: the one a, b, the other c"):
        compare(adapter(update(path="a"), update(path="b")), adapter(update(path="c")))
    with pytest.raises(BadMethod, match=r"the first belongs to the base x, the second to y"):
        compare(adapter(update(), base="x"), adapter(update(), base="y"))
    with pytest.raises(BadMethod, match=r"e is 12 x 10 in mine and 12 x 10 \(embedding\) in yours"):
        compare(adapter(update(path="e")), adapter(replace(embedding(), path="e")), names=("mine", "yours"))
    with pytest.raises(BadAdapterFile, match=r"^the first cannot.*q_proj twice"):
        compare(adapter(update(), update(1)), adapter(update()))
    with pytest.raises(BadAdapterFile, match=r"^yours cannot.*DoRA"):
        scaled = update(1, magnitude=value_of(torch.ones(12)))
        compare(adapter(update()), adapter(scaled), names=("mine", "yours"))
