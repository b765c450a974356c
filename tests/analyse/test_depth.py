"""Patterns of updates over depth: planted ones are found, and without penalties they are principal components."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakit.analyse import over_depth, patterns, unit_norms
from tests.analyse.drawn import drawn, update_of

LAYERS, UNITS = 24, 60


def with_pattern(pattern_L: Tensor, noise: float) -> Tensor:
    """Norms (L, F) of units that have more or less of one pattern, above a mean profile."""
    scores_F = drawn(1, UNITS, seed=1)[0]
    return 5 + torch.outer(pattern_L / pattern_L.norm(), scores_F) + noise * drawn(LAYERS, UNITS, seed=2)


def likeness(one_L: Tensor, other_L: Tensor) -> float:
    return abs(float(torch.cosine_similarity(one_L, other_L.double(), dim=0)))


def test_unit_norms_are_those_of_the_dense_update() -> None:
    a_RI, b_OR = drawn(4, 30), drawn(20, 4, seed=1)
    assert torch.allclose(unit_norms((a_RI, b_OR), "output"), (b_OR @ a_RI).norm(dim=1))
    assert torch.allclose(unit_norms((a_RI, b_OR), "input"), (b_OR @ a_RI).norm(dim=0))


def test_without_penalties_patterns_are_principal_components() -> None:
    norms_LF = drawn(LAYERS, UNITS)
    found, centred = patterns(norms_LF, 3, penalties=(0.0, 0.0)), norms_LF - norms_LF.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(found.explained_K, values[:3].square() / values.square().sum(), atol=1e-6)
    assert torch.allclose((found.patterns_LK * left[:, :3]).sum(0).abs(), torch.ones(3).double(), atol=1e-5)
    whole = patterns(norms_LF, LAYERS, penalties=(0.0, 0.0))
    mixed = whole.mean_L + whole.scores_FK @ whole.patterns_LK.T
    assert torch.allclose(mixed.T, norms_LF, atol=1e-5)
    assert float(whole.explained_K.sum()) == pytest.approx(1)


def test_a_smooth_pattern_is_found_better_than_by_principal_components() -> None:
    wave_L = torch.sin(torch.linspace(0, math.pi, LAYERS))
    norms_LF = with_pattern(wave_L, noise=0.4)
    found, plain = patterns(norms_LF, 1), patterns(norms_LF, 1, penalties=(0.0, 0.0))
    assert found.smooth > 0
    assert likeness(found.patterns_LK[:, 0], wave_L) > max(0.97, likeness(plain.patterns_LK[:, 0], wave_L))


def test_a_sparse_pattern_names_its_layers() -> None:
    few_L = torch.zeros(LAYERS)
    few_L[[3, 4, 17]] = 1
    found = patterns(with_pattern(few_L, noise=0.1), 1, penalties=(0.0, 0.3 * LAYERS**-0.5))
    assert torch.nonzero(found.patterns_LK[:, 0]).flatten().tolist() == [3, 4, 17]


def test_a_straight_line_is_all_that_a_great_penalty_leaves_over_uneven_layers() -> None:
    layers = [0, 1, 2, 3, 5, 8, 13, 21, 34]
    found = patterns(drawn(9, UNITS), 1, layers, penalties=(1e8, 0.0))
    slopes = found.patterns_LK[:, 0].diff() / torch.tensor(layers).double().diff()
    assert torch.allclose(slopes, slopes.mean().expand(8), atol=1e-5)
    assert found.layers == tuple(layers)


def test_few_layers_or_units_are_not_cross_validated() -> None:
    for norms_LF in (drawn(1, UNITS), drawn(2, UNITS), drawn(3, UNITS), drawn(LAYERS, 8)):
        found = patterns(norms_LF, 1)
        assert (found.smooth, found.sparse) == (0, 0)


def test_patterns_of_an_adapter_stand_over_its_layers() -> None:
    updates = [update_of(drawn(2, 30, seed=n), n * drawn(20, 2, seed=n + 50), layer=n) for n in (7, 1, 4, 2)]
    layers, norms_LF = over_depth(updates, "input")
    assert layers == (1, 2, 4, 7)
    assert torch.allclose(norms_LF[3], unit_norms(updates[0], "input"))
    found = patterns(norms_LF, 2, layers)
    assert (found.patterns_LK.shape, found.scores_FK.shape) == ((4, 2), (30, 2))


def test_updates_that_make_no_profile_are_refused() -> None:
    one = update_of(drawn(2, 30), drawn(20, 2))
    others = (
        update_of(drawn(2, 30), drawn(20, 2), role="attn.k", layer=1),
        update_of(drawn(2, 30), drawn(20, 2)),
        update_of(drawn(2, 31), drawn(20, 2), layer=1),
        update_of(drawn(2, 30), drawn(20, 2), layer=None),
    )
    for other in others:
        with pytest.raises(ValueError, match="one role and shape, one a layer"):
            over_depth([one, other], "input")
    with pytest.raises(ValueError, match="there are 0 updates"):
        over_depth([], "input")


def test_bad_input_is_said_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="the same profile"):
        patterns(drawn(LAYERS, 1).expand(LAYERS, UNITS), 1)
    with pytest.raises(ValueError, match="7 directions are asked of a matrix that has 6"):
        patterns(drawn(6, UNITS), 7)
    with pytest.raises(ValueError, match="numbers that rise"):
        patterns(drawn(3, UNITS), 1, layers=[0, 2, 1])
    with pytest.raises(ValueError, match="NaN"):
        patterns(drawn(3, UNITS) / 0, 1)
