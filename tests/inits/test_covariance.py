"""The identities behind the covariance initialisations, in float64 algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.initialise import initialisation
from lorakit.core.statistics import Moment, SiteStatistics
from lorakit.inits.covariance_both import DAMPING
from tests.laws.cases import close


def moment_of(x_ND: Tensor) -> Moment:
    return Moment(len(x_ND), x_ND.mean(0), x_ND.T.cov(correction=0))


def statistics_of(outs: int = 6, ins: int = 8, tokens: int = 50) -> tuple[Tensor, SiteStatistics]:
    """A weight, and moments of uneven, shifted data on both sides."""
    weight_OI = torch.randn(outs, ins)
    x = torch.randn(tokens, ins) @ torch.randn(ins, ins) + 1
    felt = torch.randn(tokens, outs) @ torch.randn(outs, outs)
    given = SiteStatistics(shape=(outs, ins), tokens=tokens, inputs=moment_of(x), outputs=moment_of(x @ weight_OI.T),
                           errors=moment_of(felt))  # fmt: skip
    return weight_OI, given


def with_damping(moment: Moment | None) -> Tensor:
    assert moment is not None
    second = moment.second.double()
    return second + DAMPING * second.diagonal().mean() * torch.eye(len(second))


def cost(change_OI: Tensor, d_OO: Tensor, s_II: Tensor) -> float:
    """tr(D Δ S Δᵀ)."""
    return float((d_OO @ change_OI.double() @ s_II @ change_OI.double().T).trace())


def test_both_sides_leave_the_smallest_change_in_their_metric() -> None:
    """What is left costs the squared singular values that were left out, and no other part of W leaves less."""
    weight_OI, statistics = statistics_of()
    a_RI, b_OR = initialisation("covariance-both").init(weight_OI, 2, statistics)
    s_II, d_OO = with_damping(statistics.inputs), with_damping(statistics.errors)
    left, right = torch.linalg.cholesky(d_OO).T, torch.linalg.cholesky(s_II)
    values = torch.linalg.svdvals(left @ weight_OI.double() @ right)
    ours = cost(weight_OI - b_OR @ a_RI, d_OO, s_II)
    assert ours == pytest.approx(float(values[2:].square().sum()), rel=1e-4)
    for name in ("pissa", "olora", "covariance-corda"):
        a, b = initialisation(name).init(weight_OI, 2, statistics)
        assert cost(weight_OI - b @ a, d_OO, s_II) > ours * 1.001, name


def test_both_sides_whiten() -> None:
    """Seen through both roots, A's rows and B's columns are orthogonal, and their products the singular values."""
    weight_OI, statistics = statistics_of()
    a_RI, b_OR = initialisation("covariance-both").init(weight_OI, 3, statistics)
    s_II, d_OO = with_damping(statistics.inputs), with_damping(statistics.errors)
    inner, outer = a_RI.double() @ s_II @ a_RI.double().T, b_OR.double().T @ d_OO @ b_OR.double()
    for gram in (inner, outer):
        assert close(gram, gram.diagonal().diag(), 1e-5)
    values = torch.linalg.svdvals(torch.linalg.cholesky(d_OO).T @ weight_OI.double() @ torch.linalg.cholesky(s_II))
    assert close((inner.diagonal() * outer.diagonal()).sqrt(), values[:3])


def test_both_sides_do_not_depend_on_the_units_of_loss_and_data() -> None:
    weight_OI, statistics = statistics_of()
    bigger = {name: Moment(50, m.mean_D * 30, m.covariance_DD * 900)
              for name in ("inputs", "errors") if (m := getattr(statistics, name))}  # fmt: skip
    one = initialisation("covariance-both").init(weight_OI, 2, statistics)
    other = initialisation("covariance-both").init(weight_OI, 2, SiteStatistics(**{**vars(statistics), **bigger}))
    assert close(one[0], other[0]) and close(one[1], other[1])


def test_white_data_make_it_pissa() -> None:
    weight_OI = torch.randn(6, 8)
    white = SiteStatistics(shape=(6, 8), tokens=50, inputs=Moment(50, torch.zeros(8), 3 * torch.eye(8)),
                           errors=Moment(50, torch.zeros(6), torch.eye(6) / 7))  # fmt: skip
    pissa = initialisation("pissa").init(weight_OI, 3, None)
    for name in ("covariance-both", "covariance-corda"):
        found = initialisation(name).init(weight_OI, 3, white)
        assert close(found[1] @ found[0], pissa[1] @ pissa[0]), name


def test_corda_takes_the_first_or_the_last_terms_of_one_sum() -> None:
    weight_OI, statistics = statistics_of()
    first, last = (initialisation(f"covariance-corda{mode}") for mode in ("", "-kpm"))
    a, b = first.init(weight_OI, 2, statistics)
    c, d = last.init(weight_OI, 4, statistics)
    assert close(b @ a + d @ c, weight_OI, 1e-4)


def test_sides_are_principal_directions_of_each() -> None:
    weight_OI, statistics = statistics_of()
    a_RI, b_OR = initialisation("covariance-sides").init(weight_OI, 2, statistics)
    for rows, moment in ((a_RI, statistics.inputs), (b_OR.T, statistics.outputs)):
        assert moment is not None
        values = torch.linalg.eigvalsh(moment.covariance_DD.double()).flip(0)
        assert close(rows @ moment.covariance_DD @ rows.T, values[:2].diag(), 1e-4)


def spectra(*variances: list[float], tokens: int = 50, outs: int = 8) -> list[SiteStatistics]:
    moments = [Moment(tokens, torch.zeros(len(v)), torch.diag(torch.tensor(v))) for v in variances]
    return [SiteStatistics(shape=(outs, len(m.mean_D)), tokens=tokens, inputs=m) for m in moments]


FLAT, STEEP = [1.0] * 8, [93.0, *[1.0] * 7]
SHARED_OUT: dict[str, tuple[dict[str, Any], list[int]]] = {
    "more where variance is spread": (dict(statistics=spectra(FLAT, STEEP), rank=3), [5, 1]),
    "all alike": (dict(statistics=spectra(FLAT, FLAT), rank=3), [3, 3]),
    "no more than rho allows": (dict(statistics=spectra(FLAT, STEEP), rank=3, rho=1.0), [3, 3]),
    "no more than the layer gives": (dict(statistics=spectra(FLAT, STEEP, outs=4), rank=3), [4, 2]),
    "no more than the tokens span": (dict(statistics=spectra(FLAT, STEEP, tokens=5), rank=3), [4, 2]),
    "nothing varies": (dict(statistics=spectra([0.0] * 8, FLAT), rank=2), [0, 4]),
}


@pytest.mark.parametrize("case", SHARED_OUT)
def test_ranks_go_where_variance_is_explained(case: str) -> None:
    given, expected = SHARED_OUT[case]
    init = initialisation("covariance-eva")
    assert init.ranks is not None
    assert init.ranks(**given) == expected
