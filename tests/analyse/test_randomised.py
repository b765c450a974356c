"""The top of a weight by a few passes: right within the error it states, streamed, repeatable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.analyse import Blocks, blocks, effective_rank, numerical_rank, stable_rank, top
from lorakit.analyse.randomised import product
from lorakit.core.values import value_of
from tests.analyse.drawn import drawn, spread

DECAYS = {"fast": torch.arange(1.0, 151) ** -2, "slow": torch.arange(1.0, 151) ** -0.5, "flat": torch.ones(150)}


@pytest.mark.parametrize("shape", [(150, 200), (200, 150)])
@pytest.mark.parametrize("decay", DECAYS)
def test_values_are_right_within_the_error_that_is_stated(shape: tuple[int, int], decay: str) -> None:
    weight = spread(*shape, DECAYS[decay])
    found, values = top(weight, 8, exact=0), torch.linalg.svdvals(weight)
    nearest = (values[:, None] - found.values_R).abs().min(0).values
    assert bool((nearest <= found.error_R + 1e-12).all())
    assert bool((found.values_R <= values[:8] + 1e-12).all())
    assert found.norm == pytest.approx(float(weight.norm()))
    residual = (weight.T @ found.left_OR - found.right_IR * found.values_R).norm(dim=0)
    assert torch.allclose(found.error_R, residual, atol=1e-9)
    assert torch.allclose(weight @ found.right_IR, found.left_OR * found.values_R)


def test_what_decays_is_found_precisely_and_more_passes_are_better() -> None:
    weight = spread(300, 200, torch.arange(1.0, 201) ** -1)
    values = torch.linalg.svdvals(weight)[:5]
    errors = [float((top(weight, 5, passes=n, exact=0).values_R - values).abs().max()) for n in (2, 3, 5)]
    stated = [float(top(weight, 5, passes=n, exact=0).error_R.max()) for n in (2, 3, 5)]
    assert errors[0] > errors[1] > errors[2]
    assert stated[0] > stated[1] > stated[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("exact", [0, 1000])
def test_what_is_left_out_is_known_exactly(exact: int) -> None:
    weight = spread(90, 80, torch.arange(1.0, 81) ** -1)
    found = top(weight, 8, exact=exact)
    left = weight - found.left_OR * found.values_R @ found.right_IR.T
    assert 1 - found.captured == pytest.approx(float(left.norm()) ** 2 / float(weight.norm()) ** 2)
    assert found.stable == pytest.approx(stable_rank(torch.linalg.svdvals(weight)), rel=1e-4)


def test_small_weights_are_decomposed_exactly() -> None:
    weight = drawn(40, 60)
    found, (left, values, right) = top(weight, 6), torch.linalg.svd(weight)
    assert torch.allclose(found.values_R, values[:6])
    assert torch.allclose((found.left_OR * left[:, :6]).sum(0).abs(), torch.ones(6).double())
    assert torch.allclose((found.right_IR * right[:6].T).sum(0).abs(), torch.ones(6).double())
    assert torch.equal(found.error_R, torch.zeros(6).double())
    assert found.effective == pytest.approx((effective_rank(values),) * 2)
    assert found.numerical == (numerical_rank(values, (40, 60)),) * 2
    assert torch.equal(top(weight, 15, exact=0).error_R, torch.zeros(15).double())  # two passes would span W


def test_ranks_of_a_weight_of_which_the_top_is_known_are_between_bounds() -> None:
    weight = spread(300, 200, torch.arange(1.0, 201) ** -1)
    found, values = top(weight, 20, exact=0), torch.linalg.svdvals(weight)
    low, high = found.effective
    assert low < effective_rank(values) < high < 200
    assert found.numerical[0] == 20
    assert found.numerical[1] == 200


def test_a_weight_of_few_directions_is_recognised() -> None:
    weight = spread(300, 200, torch.tensor([3.0, 2.0, 1.0]))
    found = top(weight, 5, exact=0)
    assert torch.allclose(found.values_R, torch.tensor([3.0, 2, 1, 0, 0]).double(), atol=1e-7)
    assert found.numerical == (3, 3)
    assert found.effective == pytest.approx((effective_rank(torch.tensor([3.0, 2, 1])),) * 2, rel=1e-5)
    assert bool((found.error_R < 1e-7).all())
    assert torch.allclose(found.right_IR.T @ found.right_IR, torch.eye(5).double(), atol=1e-9)


def test_a_seed_gives_the_same_bits_and_another_seed_the_same_directions() -> None:
    weight = spread(300, 200, torch.arange(1.0, 201) ** -2)
    one, again, other = top(weight, 4, exact=0), top(weight, 4, exact=0), top(weight, 4, exact=0, seed=1)
    assert torch.equal(one.values_R, again.values_R)
    assert torch.equal(one.left_OR, again.left_OR)
    assert not torch.equal(one.left_OR, other.left_OR)
    assert torch.allclose((one.left_OR * other.left_OR).sum(0).abs(), torch.ones(4).double())


def test_a_file_is_read_in_parts_once_a_pass(tmp_path: Path) -> None:
    weight, largest, passes = spread(300, 200, torch.arange(1.0, 201) ** -1).bfloat16(), 0, 0
    save_file({"w": weight}, tmp_path / "base.safetensors")

    def rows() -> Iterator[Tensor]:
        nonlocal largest, passes
        passes += 1
        with safe_open(tmp_path / "base.safetensors", "pt") as file:
            whole = file.get_slice("w")
            for start in range(0, 300, 64):
                part = whole[start : start + 64]
                largest = max(largest, len(part))
                yield part

    streamed = Blocks((300, 200), rows)
    found, whole = top(streamed, 4, passes=3, exact=0), top(weight, 4, passes=3, exact=0)
    assert (passes, largest) == (3, 64)
    assert torch.allclose(found.values_R, whole.values_R)
    assert torch.allclose(product(streamed, found.right_IR), found.left_OR * found.values_R)
    by_value = top(value_of(weight), 4, passes=3, exact=0)
    assert torch.equal(by_value.values_R, whole.values_R)


def test_a_weight_with_its_update_is_never_formed_whole() -> None:
    weight, a_RI, b_OR = drawn(2100, 20), drawn(3, 20, seed=1), drawn(2100, 3, seed=2)
    found = [*blocks(weight, plus=(a_RI, b_OR)).rows()]
    assert [len(each) for each in found] == [1024, 1024, 52]
    assert torch.allclose(torch.cat(found), weight + b_OR @ a_RI)


@pytest.mark.parametrize("exact", [0, 1000])
def test_a_weight_of_zeros_has_no_direction(exact: int) -> None:
    found = top(torch.zeros(60, 80), 2, exact=exact)
    assert [*found.values_R.tolist(), *found.error_R.tolist(), found.captured, found.stable, found.norm] == [0.0] * 7
    assert (found.effective, found.numerical) == ((0, 0), (0, 0))


def test_one_pass_is_a_plain_randomised_range() -> None:
    found = top(spread(300, 200, torch.arange(1.0, 201) ** -2), 4, passes=1, exact=0)
    assert bool((found.error_R > 0).all())


def test_bad_input_is_said_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="0 passes"):
        top(drawn(60, 80), 4, passes=0)
    with pytest.raises(ValueError, match="61 directions are asked of a matrix that has 60"):
        top(drawn(60, 80), 61)
    for exact in (0, 1000):
        with pytest.raises(ValueError, match="NaN"):
            top(drawn(60, 80) / 0, 4, exact=exact)
    with pytest.raises(ValueError, match="is no matrix"):
        top(torch.zeros(3, 4, 5), 1)
    with pytest.raises(ValueError, match="an update 60 x 70 does not fit a weight 60 x 80"):
        blocks(drawn(60, 80), plus=(drawn(2, 70), drawn(60, 2)))
