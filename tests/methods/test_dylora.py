"""DyLoRA: each rank's forward, the ranks drawn, the frozen variant, and exact truncation."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import lorakit as lk
from lorakit.core.state import adapter_tensors, attached_to, deltas_of
from lorakit.core.stepping import after_step, before_step
from lorakit.errors import BadMethod, BadState, LorakitError, NoSuchAdapter
from lorakit.methods.dylora import DyLoRA, Nested, nested
from tests.laws.cases import close, output, scramble
from tests.tiny import inputs, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def _adapted(family: str = "llama", **fields: object) -> nn.Module:
    model = tiny(family)
    torch.manual_seed(0)
    lk.attach(model, DyLoRA(**{"rank": 6, "targets": "attention", **fields}), name="a")
    scramble(model, "a")
    return model


def _own(model: nn.Module) -> list[Nested]:
    return nested(deltas_of(model, "a"))


def _at(model: nn.Module, rank: int) -> torch.Tensor:
    """The output of a training step of some rank."""
    for delta in _own(model):
        delta.drawn = rank
    found = output(model.train())
    for delta in _own(model):
        delta.drawn = None
    model.eval()
    return found


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_each_rank_is_the_formula(scaling: str) -> None:
    model = _adapted(alpha=5, scaling=scaling, targets="attn.q")
    delta, x, y = _own(model)[0].train(), torch.randn(3, 32), torch.randn(3, 32)
    for rank in range(1, 7):
        delta.drawn = rank
        scale = 5 / (rank if scaling == "alpha/r" else math.sqrt(rank))
        expected = y.double() + scale * x.double() @ delta.A.double()[:rank].T @ delta.B.double()[:, :rank].T
        assert close(delta.after(x, y).double(), expected, 1e-6)
        assert close(delta.eval().after(x, y), y + delta.branch(x, y), 0.0)  # a draw is for training
        delta.train()
    assert close(delta.after(x, y), y + delta.branch(x, y), 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_truncation_is_the_step_of_that_rank(family: str, rank: int, tmp_path: Path) -> None:
    model = _adapted(family)
    expected = _at(model, rank)
    assert DyLoRA.truncate(model, "a", rank) == f"a-{rank}"
    plain = attached_to(model, f"a-{rank}").method
    assert plain == lk.LoRA(rank=rank, targets="attention")
    assert close(output(model), expected, 1e-6)
    lk.save(model, f"a-{rank}", tmp_path / "short")
    assert close(output(PeftModel.from_pretrained(tiny(family), tmp_path / "short").eval()), expected)
    lk.merge(model, f"a-{rank}")
    assert close(output(model), expected)


@pytest.mark.parametrize(
    "fields",
    [
        dict(scaling="alpha/sqrt(r)"),
        dict(ranks={"attn.v": 2}, alphas={"attn.q": 3.0}),
        dict(init="pissa"),
        dict(targets="embed,attn.q"),
        dict(targets="mlp.up", train="norm.mlp"),
    ],
    ids=["root", "ranks", "pissa", "embed", "train"],
)
def test_truncation_of_every_variant(fields: dict) -> None:
    model = _adapted(**fields)
    with lk.use(model, None):
        base = output(model)
    for rank in (1, 3, 6):
        expected = _at(model, rank)
        assert not close(expected, base, 0.001)
        DyLoRA.truncate(model, "a", rank, f"short-{rank}")
        assert close(output(model), expected)
        lk.use(model, "a")
    plan = attached_to(model, "short-3").plan
    assert all(each.rank <= 3 for each in plan)


def test_a_truncated_adapter_is_its_own() -> None:
    model = _adapted()
    expected = output(model)
    DyLoRA.truncate(model, "a", 2, "short", trainable=True, active=False)
    assert torch.equal(output(model), expected)  # the whole one is still in use
    assert len(lk.parameters(model, "short")) == 16
    scramble(model, "short")
    assert torch.equal(output(model), expected)
    DyLoRA.truncate(model, "a", 3)
    assert lk.parameters(model, "a-3") == []


def test_what_cannot_be_truncated_is_refused() -> None:
    model = _adapted(rank_min=2)
    lk.attach(model, lk.LoRA(), name="plain", active=False)
    for rank in (0, 1, 7, 2.5, "2", True):
        with pytest.raises(BadMethod, match=f"ranks 2 to 6, not for {rank!r}"):
            DyLoRA.truncate(model, "a", rank)
    with pytest.raises(BadMethod, match="'plain' is lora"):
        DyLoRA.truncate(model, "plain", 2)
    with pytest.raises(NoSuchAdapter):
        DyLoRA.truncate(model, "b", 2)
    with pytest.raises(BadState, match="already"):
        DyLoRA.truncate(model, "a", 2, "plain")
    lk.merge(model, "a")
    with pytest.raises(BadState, match="merged"):
        DyLoRA.truncate(model, "a", 2)


def test_a_step_draws_one_rank_for_all_sites() -> None:
    model = _adapted(rank_min=2)
    drawn = []
    for step in range(1, 60):
        before_step(model, "a", step, 60)
        (rank,) = {delta.drawn for delta in _own(model)}
        drawn.append(rank)
        after_step(model, "a", step, 60)
        assert {delta.drawn for delta in _own(model)} == {None}
    assert set(drawn) == {2, 3, 4, 5, 6}
    ranks = range(2, 7)
    again = [DyLoRA(rank=6, rank_min=2).drawn(step, ranks) for step in range(1, 60)]
    assert again == drawn  # a resumed run draws the same
    assert [DyLoRA(rank=6, rank_min=2, seed=1).drawn(step, ranks) for step in range(1, 60)] != drawn


@pytest.mark.parametrize("fields", [dict(ranks={"attn.q": 8}), dict(init="covariance-eva")], ids=["ranks", "eva"])
def test_a_site_of_more_directions_has_them_all_trained(fields: dict) -> None:
    """By hand or by its data: each direction is drawn, and the largest rank of a step is the one in use afterwards."""
    model, method = tiny("llama"), DyLoRA(rank=4, targets="attention", **fields)
    batches = [inputs(model)]
    found = lk.calibrate(model, method.sites(model), batches, needs=method.needs()) if method.needs() else None
    lk.attach(model, method, name="a", statistics=found)
    most = max(delta.placement.rank for delta in _own(model))
    assert most > 4
    drawn = []
    for step in range(1, 100):
        before_step(model, "a", step, 100)
        drawn += [delta.drawn for delta in _own(model)]
        after_step(model, "a", step, 100)
    assert set(drawn) == set(range(1, most + 1))
    scramble(model, "a")
    assert close(_at(model, most), output(model), 1e-6)
    whole = output(model)
    DyLoRA.truncate(model, "a", most)
    assert close(output(model), whole, 1e-6)
    record = attached_to(model, f"a-{most}")
    assert record.method.rank == 4
    assert [each.rank for each in record.plan] == [delta.placement.rank for delta in _own(model)]


@pytest.mark.parametrize("fields", [dict(), dict(distribution="geometric"), dict(distribution="geometric", stop=0.5)])
def test_the_distribution_of_ranks(fields: dict) -> None:
    method, count = DyLoRA(rank=5, rank_min=2, **fields), 8000
    weights = [1.0] * 4 if not fields else [(1 - method.stop) ** number for number in range(4)]
    found = Counter(method.drawn(step, range(2, 6)) for step in range(count))
    for rank, weight in zip(range(2, 6), weights, strict=True):
        share = weight / sum(weights)
        assert abs(found[rank] / count - share) < 4 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_step_trains(frozen: bool) -> None:
    model = _adapted(frozen=frozen)
    free = _adapted()
    _at(model, 4).pow(2).mean().backward()
    _at(free, 4).pow(2).mean().backward()
    trained = [False, False, False, True, False, False] if frozen else [True] * 4 + [False] * 2
    for delta, other in zip(_own(model), _own(free), strict=True):
        assert delta.A.grad.any(1).tolist() == trained
        assert delta.B.grad.any(0).tolist() == trained
        assert close(delta.A.grad[3], other.A.grad[3])  # the same direction learns the same
    assert torch.equal(_at(model, 4), _at(free, 4))


def test_files_hold_the_whole_rank_even_within_a_step(tmp_path: Path) -> None:
    model = _adapted("gpt2", alpha=10)
    expected = output(model)
    before_step(model.train(), "a", 1, 10)
    assert {delta.drawn for delta in _own(model)} == {1}
    lk.save(model, "a", tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "a").eval()
    assert close(output(theirs), expected)
    again = tiny("gpt2")
    lk.load(again, tmp_path / "a", "a")
    assert attached_to(again, "a").method == attached_to(model, "a").method
    assert torch.equal(output(again), expected)
    DyLoRA.truncate(again, "a", 2)
    assert close(output(again), _at(model, 2), 1e-6)
    lk.merge(model, "a")
    assert close(output(model.eval()), expected)


def test_dropout_acts_in_a_step_of_any_rank() -> None:
    for targets in ("attn.q", "embed"):
        model = _adapted(dropout=0.5, targets=targets)
        assert not torch.equal(_at(model, 3), _at(model, 3))
        assert torch.equal(output(model), output(model))


@pytest.mark.slow
def test_a_compiled_step_follows_the_drawn_rank() -> None:
    torch._dynamo.reset()
    model = _adapted(targets="attn.q")
    expected = {rank: _at(model, rank) for rank in (2, 5)}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(compiled(tokens(model))[0], output(model))
    for rank in (2, 5, 2):
        for delta in _own(model):
            delta.drawn = rank
        assert close(compiled.train()(tokens(model))[0], expected[rank])


def test_a_resumed_run_has_the_same_bits() -> None:
    def train(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer) -> None:
        ids = tokens(model)
        for step in steps:
            before_step(model, "a", step, 12)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            after_step(model, "a", step, 12)
            optimizer.zero_grad()

    whole, resumed = _adapted().train(), _adapted().train()
    first, second = (torch.optim.AdamW(lk.parameters(model), lr=0.02) for model in (whole, resumed))
    train(whole, range(1, 6), first)
    with torch.no_grad():
        for key, value in adapter_tensors(resumed, "a").items():
            value.copy_(adapter_tensors(whole, "a")[key])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(whole, range(6, 13), first)
    train(resumed, range(6, 13), second)
    other = adapter_tensors(resumed, "a")
    assert all(torch.equal(value, other[key]) for key, value in adapter_tensors(whole, "a").items())


@pytest.mark.parametrize(
    "fields",
    [dict(rank_min=0), dict(rank_min=9), dict(rank_min="1"), dict(distribution="normal"), dict(stop=0), dict(stop=1.0),
     dict(stop="a"), dict(seed=-1), dict(rank="8"), dict(dropout=1.0)],
)  # fmt: skip
def test_hyperparameters_are_checked_where_they_are_written(fields: dict) -> None:
    with pytest.raises(LorakitError):
        DyLoRA(**fields)
