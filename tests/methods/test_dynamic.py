"""Rank that changes while plain LoRA trains: what grows, what shrinks, what stays, and what a file holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.core.state import adapter_buffers, adapter_tensors, attached_to, deltas_of
from lorakit.core.stepping import after_step, before_step
from lorakit.errors import BadAdapterFile
from lorakit.methods._importance import Directions, directions
from lorakit.methods.dynamic import DynamicLoRA
from tests.laws.cases import close, output, scramble
from tests.tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _own(model: nn.Module, name: str = "a") -> list[Directions]:
    return directions(deltas_of(model, name))


def _kept(model: nn.Module) -> int:
    return sum(int(delta.kept_R.sum()) for delta in _own(model))


def _attached(seed: int = 1, **fields: object) -> nn.Module:
    model = tiny("llama")
    torch.manual_seed(seed)
    lk.attach(model, DynamicLoRA(**fields), name="a")
    return model.train()


def _train(model: nn.Module, steps: range, total: int, optimizer: torch.optim.Optimizer | None = None) -> list[int]:
    """Train some steps of a run; the number of directions kept after each."""
    ids, kept = tokens(model), []
    optimizer = optimizer or torch.optim.AdamW(lk.parameters(model, "a"), lr=0.02)
    for step in steps:
        before_step(model, "a", step, total)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        after_step(model, "a", step, total)
        optimizer.zero_grad()
        kept.append(_kept(model))
        for delta in _own(model):
            assert not delta.B[:, ~delta.kept_R].any()
    return kept


@pytest.mark.parametrize(("start", "end"), [(2, 6), (6, 2), (4, 4)])
def test_the_budget_is_kept_over_a_schedule(start: int, end: int) -> None:
    model = _attached(rank_max=8, rank_start=start, rank_end=end, warmup=3, final=5, every=2)
    method, shapes = attached_to(model, "a").method, [value.shape for value in lk.parameters(model)]
    assert _kept(model) == 4 * start
    kept = _train(model, range(1, 25), 24)
    due = [method.allowed(step, 24, start=4 * start, end=4 * end) for step in range(1, 25)]
    for step, (have, budget) in enumerate(zip(kept, due, strict=True), 1):
        before = kept[step - 2] if step > 1 else 4 * start
        assert have == (budget if method.phase(step, 24).changes else before)
    assert kept[-6:] == [4 * end] * 6
    assert [value.shape for value in lk.parameters(model)] == shapes
    assert all(bool(delta.B[:, delta.kept_R].any(0).all()) for delta in _own(model))  # what is kept has learned


def test_growing_changes_no_output_and_takes_nothing_away() -> None:
    model = _attached(rank_max=8, rank_start=3, rank_end=6, warmup=2, final=1, every=7)
    _train(model, range(1, 7), 9)
    ids = tokens(model)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(lk.parameters(model), lr=0.1).step()
    still = copy.deepcopy(model)
    after_step(still, "a", 6, 9)  # no step of change
    after_step(model, "a", 7, 9)
    assert _kept(still) == 12 < _kept(model)
    for delta, before in zip(_own(model), _own(still), strict=True):
        assert bool((delta.kept_R | ~before.kept_R).all())
        assert torch.equal(delta.B, before.B)
        assert not delta.B[:, delta.kept_R & ~before.kept_R].any()
        assert bool((delta.A.norm(dim=1) > 0).all())
    for mode in (True, False):
        assert torch.equal(output(model.train(mode)), output(still.train(mode)))


def _tell(model: nn.Module, scores: list[list[float]]) -> None:
    """Set each direction's importance."""
    for delta, values in zip(_own(model), scores, strict=True):
        for value, mean, spread in delta.watched():
            value.grad = None  # no news
            mean.zero_()
            spread.zero_()
        delta.sensitivity_A[:] = torch.tensor(values).sqrt()[:, None]
        delta.uncertainty_A[:] = torch.tensor(values).sqrt()[:, None]


def _masks(model: nn.Module) -> list[list[int]]:
    return [delta.kept_R.nonzero().flatten().tolist() for delta in _own(model)]


def test_shrinking_takes_the_least_important_of_all_sites() -> None:
    model = _attached(rank_max=3, rank_start=3, rank_end=1, final=1, every=1, targets="attn.q")
    scramble(model, "a")
    _tell(model, [[5.0, 1.0, 4.0], [0.5, 3.0, 2.0]])
    before = [(delta.A.detach().clone(), delta.B.detach().clone()) for delta in _own(model)]
    after_step(model, "a", 9, 10)  # the last choice
    assert _masks(model) == [[0, 2], []]
    assert [row[3] for row in lk.summary(model).adapters[0].rows] == ["rank 2 of 3, scale 8", "rank 0 of 3, scale 8"]
    for delta, (a, b) in zip(_own(model), before, strict=True):
        assert torch.equal(delta.A, a)  # rows stay, so that they can return
        assert torch.equal(delta.B, b * delta.kept_R)


def test_while_the_budget_grows_even_the_useless_stay() -> None:
    model = _attached(rank_max=3, rank_start=1, rank_end=2, final=1, every=1, targets="attn.q")
    _tell(model, [[0.0, 9.0, 8.0], [0.0, 1.0, 7.0]])
    after_step(model, "a", 9, 10)
    assert _masks(model) == [[0, 1, 2], [0]]


def test_at_a_steady_budget_rank_moves_and_the_pruned_may_return() -> None:
    model = _attached(rank_max=3, rank_start=2, rank_end=2, warmup=0, final=1, every=1, targets="attn.q")
    scramble(model, "a")
    _tell(model, [[3.0, 1.0, 2.0], [5.0, 0.5, 4.0]])
    after_step(model, "a", 1, 10)
    assert _masks(model) == [[0, 2], [0, 2]]
    row, own = _own(model)[0].A[1].detach().clone(), _own(model)[0]
    _tell(model, [[3.0, 6.0, 2.0], [5.0, 0.5, 1.0]])
    after_step(model, "a", 2, 10)
    assert _masks(model) == [[0, 1, 2], [0]]
    assert torch.equal(own.A[1], row)
    assert not own.B[:, 1].any()  # it begins at zero again


def test_a_pruned_direction_is_judged_by_the_gradient_of_its_zero_column() -> None:
    model = _attached(rank_max=4, rank_start=2, rank_end=2, warmup=5, final=1)
    _train(model, range(1, 5), 20)
    for delta in _own(model):
        assert bool((delta.importance() > 0).all())
        assert float(delta.importance()[delta.kept_R].min()) > float(delta.importance()[~delta.kept_R].max())


def _pruned(family: str) -> nn.Module:
    """A model whose sites have kept different numbers of directions, one of them none."""
    model = tiny(family)
    lk.attach(model, DynamicLoRA(rank_max=6, rank_start=6, rank_end=3, targets="attn.q,attn.v,mlp.up"), name="a")
    scramble(model, "a", std=0.3)
    with torch.no_grad():
        for number, delta in enumerate(_own(model)):
            delta.keep(torch.rand(6) < number / 6 if number else torch.zeros(6).bool())
            delta.prune()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("training", [False, True])
def test_a_file_is_plain_lora_of_the_kept_directions(family: str, training: bool, tmp_path: Path) -> None:
    model = _pruned(family).train(training)
    lk.save(model, "a", tmp_path / "a")
    expected = output(model.eval())
    again = tiny(family)
    lk.load(again, tmp_path / "a")
    assert torch.equal(output(again), expected)
    assert close(output(PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()), expected)
    lk.save(again, "a", tmp_path / "b")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    told = json.loads((tmp_path / "a" / CONFIG).read_text())
    ranks = {len(value) for key, value in load_file(tmp_path / "a" / TENSORS).items() if "lora_A" in key}
    assert told["peft_type"] == "LORA"
    assert {told["r"], *told["rank_pattern"].values()} == ranks
    assert min(ranks) < max(ranks) < 6 * (2 if family == "gpt2" else 1) + 1
    if family != "gpt2":  # the slices of a fused layer hold as many as the longest
        assert sum(len(v) for k, v in load_file(tmp_path / "a" / TENSORS).items() if "lora_A" in k) == sum(
            max(1, int(delta.kept_R.sum())) for delta in _own(model)
        )


def test_a_peft_folder_without_our_header_is_plain_lora(tmp_path: Path) -> None:
    model = _pruned("llama")
    lk.save(model, "a", tmp_path / "a")
    save_file(load_file(tmp_path / "a" / TENSORS), tmp_path / "a" / TENSORS)
    again = tiny("llama")
    lk.load(again, tmp_path / "a")
    assert attached_to(again, "a").method.name == "lora"
    assert close(output(again), output(model))


@pytest.mark.parametrize("rows", [7, 12])
def test_a_file_with_more_than_there_is_room_for_is_refused(rows: int, tmp_path: Path) -> None:
    lk.save(_pruned("llama"), "a", tmp_path / "a")
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors = load_file(tmp_path / "a" / TENSORS)
    name = next(key for key in tensors if "lora_A" in key)
    tensors[name] = torch.zeros(rows, 32)
    tensors[name.replace("lora_A", "lora_B")] = torch.zeros(tensors[name.replace("lora_A", "lora_B")].shape[0], rows)
    save_file(tensors, tmp_path / "a" / TENSORS, metadata=metadata)
    with pytest.raises(BadAdapterFile, match=f"shape \\({rows}, 32\\)"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_a_loaded_adapter_grows_further(tmp_path: Path) -> None:
    model = _attached(rank_max=8, rank_start=2, rank_end=4, final=1, every=2)
    _train(model, range(1, 9), 8)
    lk.save(model, "a", tmp_path / "a")
    again = tiny("llama").train()
    state = torch.get_rng_state()
    lk.load(again, tmp_path / "a", trainable=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert _kept(again) == _kept(model) == 16
    attached_to(again, "a").method = DynamicLoRA(rank_max=8, rank_start=4, rank_end=7, final=1, every=2)
    assert _train(again, range(1, 9), 8)[-1] == 28
    assert all(bool(delta.B[:, delta.kept_R].any(0).sum() > 4) for delta in _own(again) if int(delta.kept_R.sum()) > 5)


def test_merging_a_pruned_adapter() -> None:
    model = _pruned("gpt2")
    expected = output(model)
    lk.merge(model, "a")
    assert close(output(model), expected)


def test_a_resumed_run_has_the_same_bits() -> None:
    fields = dict(rank_max=6, rank_start=2, rank_end=4, warmup=2, final=4, every=3)
    whole, resumed = _attached(**fields), _attached(seed=2, **fields)
    first, second = (torch.optim.AdamW(lk.parameters(model, "a"), lr=0.02) for model in (whole, resumed))
    _train(whole, range(1, 8), 16, first)
    with torch.no_grad():
        for listed in (adapter_tensors, adapter_buffers):
            for key, value in listed(resumed, "a").items():
                value.copy_(listed(whole, "a")[key])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert _train(whole, range(8, 17), 16, first) == _train(resumed, range(8, 17), 16, second)
    for listed in (adapter_tensors, adapter_buffers):
        other = listed(resumed, "a")
        assert all(torch.equal(value, other[key]) for key, value in listed(whole, "a").items())
