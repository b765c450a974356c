"""The budget's figures, averages and choice that AdaLoRA and dynamic rank share."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import RankAllocator
from safetensors import safe_open
from safetensors.torch import load_file

import lorakit as lk
from lorakit.core.files import TENSORS
from lorakit.core.header import with_header
from lorakit.core.state import deltas_of
from lorakit.core.stepping import before_step
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.methods._importance import Budgeted, budget, directions, observe, top
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.dynamic import DynamicLoRA
from tests.laws.cases import bits, output, same_bits, scramble
from tests.tiny import tiny

PAPER = dict(start=864, end=576, warmup=500, final=1500)


@pytest.mark.parametrize(("step", "kept"), [(510, 855), (750, 697), (1000, 612), (1250, 580), (1400, 576)])
def test_the_budgets_of_the_papers_schedule(step: int, kept: int) -> None:
    assert budget(step, 3000, **PAPER) == kept


def test_a_budget_holds_still_at_both_ends_and_moves_one_way_between() -> None:
    for start, end, sign in ((864, 576, -1), (100, 700, 1), (300, 300, 0)):
        values = [budget(t, 3000, start=start, end=end, warmup=500, final=1500) for t in range(3001)]
        assert values[:501] == [start] * 501
        assert values[1500:] == [end] * 1501
        moves = {(b > a) - (b < a) for a, b in pairwise(values)}
        assert moves == {0, sign}
        assert all(isinstance(value, int) for value in values)


@pytest.mark.parametrize("schedule", [(30, 5, 8, 3), (24, 0, 0, 1), (40, 1, 30, 4)])
def test_phases_and_budgets_are_pefts(schedule: tuple[int, int, int, int]) -> None:
    steps, warmup, final, every = schedule
    config = AdaLoraConfig(init_r=9, target_r=4, tinit=warmup, tfinal=final, deltaT=every, total_step=steps)
    allocator = RankAllocator(torch.nn.Linear(1, 1), config, "default")
    allocator.init_bgt, allocator.target_bgt = 9 * 7, 4 * 7
    method = AdaLoRA(rank_start=9, rank_target=4, warmup=warmup, final=final, every=every)
    for step in range(1, steps - final):
        kept, masks = allocator.budget_schedule(step)
        assert method.allowed(step, steps, start=9 * 7, end=4 * 7) == kept
        assert method.phase(step, steps) == (True, masks, False)
    assert method.phase(steps - final, steps) == (False, True, False)  # PEFT's force_mask
    for step in range(steps - final + 1, steps + 1):
        assert method.phase(step, steps) == (False, False, True)
        assert method.allowed(step, steps, start=9 * 7, end=4 * 7) == 4 * 7


def test_shares_of_a_run_are_cut_to_whole_steps() -> None:
    method = DynamicLoRA(warmup=0.25, final=0.5, every=1)
    assert [method.phase(step, 9).changes for step in range(1, 10)] == [step in (3, 4, 5) for step in range(1, 10)]
    assert method.phase(1, 1) == (False, True, False)  # no run is too short for shares


def test_averages_are_the_formula() -> None:
    model = tiny("llama")
    lk.attach(model, AdaLoRA(rank_start=3, rank_target=2))
    own = directions(deltas_of(model, "default"))
    expected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for _ in range(4):
        scramble(model, "default")
        for delta in own:
            for value in delta.parameters():
                value.grad = torch.randn_like(value)
        own[0].B.grad = None  # a site that no example reached
        observe(own, 0.8, 0.6)
        for delta in own:
            for value in delta.parameters():
                mean, spread = expected.get(id(value), (torch.zeros(()).double(),) * 2)
                now = (value.double() * (0.0 if value.grad is None else value.grad.double())).abs()
                mean = 0.8 * mean + 0.2 * now
                expected[id(value)] = mean, 0.6 * spread + 0.4 * (now - mean).abs()
    for delta in own:
        for value, mean, spread in delta.watched():
            for ours, theirs in zip((mean, spread), expected[id(value)], strict=True):
                assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-12)
        (a, b, e) = (m * s for m, s in (expected[id(p)] for p in (delta.A, delta.B, delta.E)))
        scores = e.flatten() + a.mean(1) + b.mean(0)
        assert torch.allclose(delta.importance().detach().double(), scores, rtol=1e-5)


def test_the_top_is_kthvalues_and_a_tie_is_out() -> None:
    scores = torch.randperm(40).float()
    assert all(int(top(scores, count).sum()) == count for count in range(41))
    assert top(torch.zeros(5), 3).sum() == 0
    assert top(torch.zeros(5), 5).all()


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
@pytest.mark.parametrize(
    "fields",
    [
        dict(warmup=-1),
        dict(warmup=2.5),
        dict(final=float("nan")),
        dict(warmup=0.6, final=0.5),
        dict(every=0),
        dict(beta1=1.0),
        dict(beta2=-0.1),
        dict(dropout=1.0),
        dict(bias="some"),
        dict(rank_start=0),
        dict(rank_start="8"),
        dict(rank_target=13, rank_end=13),
        dict(alpha=float("inf")),
        dict(targets=()),
    ],
)
def test_hyperparameters_are_checked_where_they_are_written(kind: type[Budgeted], fields: dict) -> None:
    known = {key: value for key, value in fields.items() if key in kind.__dataclass_fields__}
    with pytest.raises(BadMethod):
        kind(**known)


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
def test_what_it_cannot_hold_is_refused_before_anything_changes(kind: type[Budgeted]) -> None:
    room = "rank_start" if kind is AdaLoRA else "rank_max"
    model = tiny("llama")
    before = bits(model)
    for fields, words in (({room: 17}, "the largest rank there is 16"), ({"targets": "embed"}, "Embedding")):
        with pytest.raises(BadMethod, match=words):
            lk.attach(model, kind(**fields))
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
@pytest.mark.parametrize("rank", [17, 2**31 - 1])
def test_a_file_cannot_ask_for_more_directions_than_a_matrix_has(
    kind: type[Budgeted], rank: int, tmp_path: Path
) -> None:
    model = tiny("llama")
    lk.attach(model, kind(), name="a")
    lk.save(model, "a", tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["lorakit"])
    narrow = next(placed for placed in header["plan"] if placed["role"] == "attn.v")
    narrow["rank"] = rank
    (tmp_path / TENSORS).write_bytes(with_header(load_file(tmp_path / TENSORS), header))
    with pytest.raises(BadAdapterFile, match=f"rank {rank} is above the matrix of .*the largest rank there is 16"):
        lk.load(tiny("llama"), tmp_path)


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
def test_directions_without_values_are_not_drawn(kind: type[Budgeted]) -> None:
    model = tiny("llama")
    lk.attach(model, kind())
    delta = directions(deltas_of(model, "default"))[0].to_empty(device="meta")
    before = torch.get_rng_state()
    delta.refill(0, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
def test_a_run_without_a_step_to_change_ranks_in_is_refused(kind: type[Budgeted]) -> None:
    model = tiny("llama")
    lk.attach(model, kind(warmup=10, final=20))
    with pytest.raises(BadMethod, match="of 30 steps, 10 are warmup and 20 final"):
        before_step(model, "default", 1, 30)
    before_step(model, "default", 1, 31)


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
def test_the_order_of_directions_changes_rounding_only(kind: type[Budgeted]) -> None:
    model = tiny("llama")
    lk.attach(model, kind(targets="linear"), name="a")
    scramble(model, "a")
    expected = output(model)
    for number, delta in enumerate(directions(deltas_of(model, "a"))):
        delta.keep(torch.arange(12) % 3 == number % 3)
        assert delta.order_R[:4].tolist() == list(range(number % 3, 12, 3))
    assert torch.allclose(output(model), expected, atol=1e-5)
    assert torch.allclose(output(model.train()), expected, atol=1e-5)
