"""Smooth and sparse components: their limits, their optimum, their cross-validation, and what they are good for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakit.core.initialise import initialisation
from lorakit.core.statistics import Moment, SiteStatistics, merged
from lorakit.errors import BadMethod
from lorakit.inits import structured
from lorakit.inits._geometry import graph, grid, line, seriation, spline
from lorakit.inits._matrix import principal
from lorakit.inits._spatial import SPARSITY, admm, components, cross_validated, polar, problem, unexplained
from tests.laws.cases import close

CPU = torch.device("cpu")


def random_moment(width: int) -> Tensor:
    root = torch.randn(width, width, dtype=torch.float64)
    moment = root @ root.T
    return moment / torch.linalg.eigvalsh(moment)[-1]


def moment_of(x_ND: Tensor) -> Moment:
    return Moment(len(x_ND), x_ND.mean(0), x_ND.T.cov(correction=0))


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


def test_without_penalties_it_is_pca() -> None:
    moment = random_moment(9)
    phi = components(moment, line(moment), 3, 0.0, 0.0)
    values, vectors = torch.linalg.eigh(moment)
    assert close(projector(phi), projector(vectors[:, -3:]))
    assert close(phi.T @ moment @ phi, values.flip(0)[:3].diag())


def test_admm_finds_the_eigenvectors_where_nothing_is_sparse() -> None:
    """The iteration's slow road to what the decomposition gives at once."""
    moment = random_moment(6) - 0.3 * line(torch.eye(6).double())
    exact = principal(moment, 2)
    start = polar(exact + 0.3 * torch.randn(6, 2).double())
    found = admm(moment, start, 0.0, iterations=20_000, tolerance=1e-10)
    assert not close(projector(start), projector(exact), 1e-2)
    assert close(projector(found), projector(exact), 1e-4)


@pytest.mark.parametrize("sparse", [0.0, 0.1, 0.4])
def test_admm_finds_the_best_direction_of_a_plane(sparse: float) -> None:
    """Every direction of two channels can be tried."""
    gain = torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=torch.float64)
    angles = torch.linspace(0, math.pi, 100_001, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()])
    worth = (circle * (gain @ circle)).sum(0) - sparse * circle.abs().sum(0)
    best = circle[:, worth.argmax()]
    found = admm(gain, principal(gain, 1), sparse, iterations=20_000, tolerance=1e-9)[:, 0]
    assert close((found * best).sum().abs(), torch.tensor(1.0), 1e-6)


@pytest.mark.parametrize("sparse", [0.0, 0.05, 1.0, 50.0])
@pytest.mark.parametrize("smooth", [0.0, 0.1, 1e6])
def test_components_are_orthonormal(smooth: float, sparse: float) -> None:
    moment = random_moment(8)
    phi = components(moment, line(moment), 3, smooth, sparse)
    assert close(phi.T @ phi, torch.eye(3).double())


def test_smooth_without_end_is_straight() -> None:
    moment = random_moment(9)
    straight = torch.stack([torch.ones(9), torch.arange(9)], 1).double()
    phi = components(moment, line(moment), 2, 1e9, 0.0)
    assert close(projector(phi), projector(straight), 1e-4)
    level = components(moment, graph(moment), 1, 1e9, 0.0)
    assert close(projector(level), torch.full((9, 9), 1 / 9).double(), 1e-4)


def test_sparse_channels_are_zero_to_the_bit() -> None:
    moment = torch.diag(torch.tensor([1.0, 0.9, 0.2, 0.1, 0.1]).double())
    moment[0, 1:] = moment[1:, 0] = torch.tensor([0.3, 0.02, 0.02, 0.02]).double()
    dense, thin = (components(moment, line(moment), 2, 0.0, sparse) for sparse in (0.0, 0.3))
    assert bool((dense.abs().sum(1) > 0).all())
    assert (thin.abs().sum(1) > 0).tolist() == [True, True, False, False, False]


def test_spline_roughness_is_the_integral_of_the_bend() -> None:
    """Against the second derivative of the natural spline itself, piecewise linear through γ with γ = 0 at the ends."""
    places = torch.tensor([0.0, 0.7, 1.0, 2.5, 4.0, 4.2]).double()
    values, gaps = torch.randn(6).double(), places.diff()
    system, bend = torch.eye(6).double(), torch.zeros(6).double()
    for i in range(1, 5):  # the textbook equations of a natural cubic spline's second derivatives
        system[i, i - 1], system[i, i], system[i, i + 1] = gaps[i - 1], 2 * (gaps[i - 1] + gaps[i]), gaps[i]
        bend[i] = 6 * ((values[i + 1] - values[i]) / gaps[i] - (values[i] - values[i - 1]) / gaps[i - 1])
    second = torch.linalg.solve(system, bend)
    left, right = second[:-1], second[1:]
    integral = (gaps * (left**2 + left * right + right**2) / 3).sum()
    assert close(values @ spline(places) @ values, integral, 1e-9)
    assert float((spline(places) @ places).abs().max()) < 1e-9


def test_a_grid_is_straight_along_heads_and_channels() -> None:
    omega = grid(3)(torch.eye(12).double())
    head, channel = torch.arange(12).double() // 4, torch.arange(12).double() % 4
    flat = torch.stack([torch.ones(12).double(), head, channel, head * channel])
    assert float((omega @ flat.T).abs().max()) < 1e-9
    assert int((torch.linalg.eigvalsh(omega) < 1e-9).sum()) == 4
    with pytest.raises(BadMethod, match="12 channels do not divide among 5 heads"):
        grid(5)(torch.eye(12))


def test_seriation_finds_the_line_that_channels_stand_on() -> None:
    places = torch.arange(12).double()
    covariance = torch.exp(-(places[:, None] - places).abs() / 3)
    shuffled = torch.randperm(12)
    found = seriation(covariance[shuffled][:, shuffled])
    assert close(found, line(covariance)[shuffled][:, shuffled])


def test_graph_is_the_laplacian_of_correlations() -> None:
    covariance = random_moment(5)
    covariance[4] = covariance[:, 4] = 0.0  # a channel that never varies has no neighbours
    deviations = covariance.diagonal().sqrt()
    omega = graph(covariance)
    assert float(omega.sum(1).abs().max()) < 1e-12 and bool((omega[4] == 0).all())
    assert close(-omega[1, 2], (covariance[1, 2] / deviations[1] / deviations[2]).abs())


def test_the_criterion_is_the_unexplained_part_of_held_out_data() -> None:
    parts = [torch.randn(n, 6).double() * torch.arange(1, 7) for n in (9, 14, 11)]
    given = problem([moment_of(part) for part in parts], line(torch.eye(6).double()), CPU)
    whole = torch.cat(parts)
    top = torch.linalg.eigvalsh(whole.T.cov(correction=0))[-1]
    total = 0.0
    for number, part in enumerate(parts):
        train = torch.cat([other for n, other in enumerate(parts) if n != number]) - whole.mean(0)
        phi = components(train.T @ train / len(train) / top, given.roughness_DD, 2, 0.2, 0.0)
        held = part - whole.mean(0)
        total += float((held - held @ phi @ phi.T).square().sum() / top)
    assert unexplained(given, 2, 0.2, [0.0]) == pytest.approx([total], rel=1e-5)


def planted(seed: int, width: int = 40, rows: int = 25) -> tuple[Tensor, list[Moment]]:
    """A smooth bump on a quarter of the channels under noise, in few samples: where plain PCA overfits."""
    generator = torch.Generator().manual_seed(seed)
    bump = torch.zeros(width)
    bump[12:22] = torch.hann_window(12, periodic=False)[1:-1]
    bump /= bump.norm()
    strength = 2.5 * torch.randn(rows, 1, generator=generator)
    data = strength * bump + torch.randn(rows, width, generator=generator)
    return bump, [moment_of(part) for part in data.split(5)]


def test_a_planted_smooth_sparse_pattern_is_found_better_than_by_pca() -> None:
    ours, pca, smooth_only = [], [], []
    for seed in range(8):
        bump, parts = planted(seed)
        given = problem(parts, line(torch.eye(40).double()), CPU)
        smooth, sparse = cross_validated(given, 1)
        for found, taus in ((ours, (smooth, sparse)), (smooth_only, (smooth, 0.0)), (pca, (0.0, 0.0))):
            phi = components(given.moment_DD, given.roughness_DD, 1, *taus)[:, 0]
            found.append(abs(float(phi @ bump.double())))
    assert sum(ours) / 8 > sum(pca) / 8 + 0.1
    assert sum(ours) / 8 > sum(smooth_only) / 8 + 0.01


def test_penalties_that_do_not_help_are_not_chosen() -> None:
    """Two rough, dense directions in plenty of data: smoothing them can only hurt."""
    rough = torch.linalg.qr(torch.randn(10, 2).double() * torch.tensor([1.0, -1.0] * 5)[:, None])[0]
    data = torch.randn(4000, 2).double() @ (rough * 5).T + 0.1 * torch.randn(4000, 10).double()
    given = problem([moment_of(part) for part in data.split(800)], line(torch.eye(10).double()), CPU)
    smooth, sparse = cross_validated(given, 2)
    assert smooth == 0 and sparse <= SPARSITY[1] / math.sqrt(10)


def test_the_initialisation_is_the_components_of_its_geometry() -> None:
    _, parts = planted(1)
    parts_ = tuple(Moment(m.tokens, m.mean_D.float(), m.covariance_DD.float()) for m in parts)
    statistics = SiteStatistics(shape=(7, 40), tokens=25, inputs=merged(parts_), folds=parts_)
    weight = torch.zeros(7, 40)
    along, _ = initialisation("structured-line").init(weight, 2, statistics)
    over, b_OR = structured.init(weight, 2, statistics)
    by_heads, _ = structured.init(weight, 2, statistics, geometry=grid(4))
    given = problem(parts_, line(torch.eye(40).double()), CPU)
    expected = components(given.moment_DD, given.roughness_DD, 2, *cross_validated(given, 2)).T
    assert close(along, expected.float())
    assert not close(along, over, 1e-2) and not close(along, by_heads, 1e-2)
    for a_RI in (along, over, by_heads):
        assert close(a_RI @ a_RI.T, torch.eye(2)) and not b_OR.any()


def test_data_that_cannot_be_divided_or_do_not_vary_are_refused() -> None:
    one, empty = Moment(9, torch.zeros(3), torch.eye(3)), Moment(0, torch.empty(0), torch.empty(0))
    with pytest.raises(BadMethod, match="at least two sequences"):
        problem([one, empty], line(torch.eye(3)), CPU)
    still = Moment(9, torch.ones(3), torch.zeros(3, 3))
    with pytest.raises(BadMethod, match="does not vary"):
        problem([still, still], line(torch.eye(3)), CPU)
