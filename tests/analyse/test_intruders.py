"""Intruder dimensions: found where they were put, nowhere else, and never claimed where they cannot be known."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

from lorakit.analyse import intruders
from tests.analyse.drawn import drawn, spread, update_of

VALUES = torch.arange(1.0, 121) ** -0.5


def dense(weight: Tensor, delta: Tensor, count: int) -> Tensor:
    """The largest |cosine| of each of the top left singular vectors of W + ΔW with those of W."""
    own, new = (torch.linalg.svd(matrix, full_matrices=False)[0] for matrix in (weight, weight + delta))
    return (new.T @ own).abs().max(1).values[:count]


def planted(weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """An update of rank 2 in random directions, of this strength."""
    delta = spread(len(weight), weight.shape[1], torch.tensor([strength, strength / 2]), seed=7)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return right[:2], left[:, :2] * values[:2]


@pytest.mark.parametrize("shape", [(120, 160), (160, 120)])
@pytest.mark.parametrize("strength", [0.01, 0.4, 3.0])
def test_cosines_are_those_of_the_dense_matrices(shape: tuple[int, int], strength: float) -> None:
    weight = spread(*shape, VALUES)
    a_RI, b_OR = planted(weight, strength)
    found = intruders(weight, update_of(a_RI, b_OR))
    assert torch.allclose(found.cosines_K, dense(weight, b_OR @ a_RI, 10), atol=1e-8)
    assert torch.equal(found.bounds_K, found.cosines_K)
    assert found.certain == found.possible == torch.nonzero(found.cosines_K < 0.5).flatten().tolist()


def test_a_strong_update_in_new_directions_intrudes_and_one_in_old_directions_does_not() -> None:
    weight = spread(120, 160, VALUES)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    assert intruders(weight, planted(weight, 3.0)).certain == [0, 1]
    assert intruders(weight, planted(weight, 0.01)).certain == []
    stronger = right[:2], 0.5 * left[:, :2] * values[:2]
    assert intruders(weight, stronger, threshold=0.99).certain == []


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_of_a_large_weight_the_truth_lies_between_the_bounds(strength: float) -> None:
    weight = spread(120, 160, torch.arange(1.0, 121) ** -2)
    a_RI, b_OR = planted(weight, strength)
    found, truth = intruders(weight, (a_RI, b_OR), count=6, known=20, exact=0), dense(weight, b_OR @ a_RI, 6)
    assert bool((found.cosines_K <= truth + 1e-4).all())
    assert bool((truth <= found.bounds_K + 1e-4).all())
    certain = torch.nonzero(truth < 0.5).flatten().tolist()
    assert set(found.certain) <= set(certain) <= set(found.possible)


def test_what_is_not_known_of_a_large_weight_is_not_claimed() -> None:
    """The update strengthens the 50th direction of W, of which only 10 are known: no intruder, but it may seem one."""
    weight = spread(120, 160, torch.arange(1.0, 121) ** -2)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    update = right[49:50], 2 * left[:, 49:50]
    assert intruders(weight, update).certain == []
    found = intruders(weight, update, known=10, exact=0)
    assert found.possible == [0]
    assert found.certain == []


@pytest.mark.parametrize("strength", [0.01, 0.4, 3.0])
def test_peft_counts_the_same_intruders(strength: float) -> None:
    weight, said = spread(120, 160, VALUES), list[str]()
    model = get_peft_model(nn.Sequential(nn.Linear(160, 120)), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer, (a_RI, b_OR) = model.base_model.model[0], planted(weight, strength)
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.lora_A["default"].weight.copy_(a_RI)
        layer.lora_B["default"].weight.copy_(b_OR)
    reduce_intruder_dimension(model, logging_sink=said.append)
    count = len(intruders(weight, (a_RI, b_OR)).certain)
    assert said[0].endswith(f"Intruders: {count}" if count else "No intruders")


def test_an_update_of_another_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a weight"):
        intruders(drawn(12, 16), (drawn(2, 15), drawn(12, 2)))
    with pytest.raises(ValueError, match="NaN"):
        intruders(drawn(12, 16) / 0, (drawn(2, 16), drawn(12, 2)))
