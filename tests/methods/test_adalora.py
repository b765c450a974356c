"""AdaLoRA against PEFT from the same tensors, its files both ways, and what pruning keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.core import files
from lorakit.core.state import adapter_buffers, adapter_tensors, deltas_of
from lorakit.core.stepping import after_step, before_step, penalty
from lorakit.errors import BadAdapterFile
from lorakit.methods._importance import Budgeted, directions
from lorakit.methods.adalora import AdaLoRA, Triplets, triplets
from lorakit.methods.dynamic import DynamicLoRA
from tests.laws.cases import close, output, scramble
from tests.tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SCHEDULE = dict(warmup=2, final=4, every=3)
STEPS = 16


def _own(model: nn.Module, name: str = "a") -> list[Triplets]:
    return triplets(deltas_of(model, name))


def _theirs(family: str = "llama", **fields: object) -> PeftModel:
    """PEFT's AdaLoRA with trained-looking numbers."""
    config = AdaLoraConfig(**{"total_step": STEPS, "target_modules": ["q_proj", "v_proj"], **fields})
    model = get_peft_model(tiny(family), config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value += 0.1 * torch.randn_like(value)
    return model


def _twins() -> tuple[nn.Module, PeftModel]:
    """Ours and PEFT's, on equal bases with equal numbers."""
    theirs = _theirs(init_r=6, target_r=3, lora_alpha=16, tinit=2, tfinal=4, deltaT=3, orth_reg_weight=0.1)
    model = tiny("llama")
    lk.attach(model, AdaLoRA(rank_start=6, rank_target=3, alpha=16, **SCHEDULE), name="a")
    with torch.no_grad():
        for delta, layer in _pairs(model, theirs):
            delta.A.copy_(layer.lora_A["default"])
            delta.B.copy_(layer.lora_B["default"])
            delta.E.copy_(layer.lora_E["default"])
    return model, theirs


def _pairs(model: nn.Module, theirs: PeftModel) -> list[tuple[Triplets, nn.Module]]:
    layers = theirs.base_model.model
    return [(delta, layers.get_submodule(delta.placement.path)) for delta in _own(model)]


def test_the_output_is_pefts() -> None:
    model, theirs = _twins()
    with lk.use(model, None):
        base = output(model)
    assert not close(base, output(theirs), 0.01)
    assert close(output(model), output(theirs))
    assert close(output(model.train()), output(theirs))


def test_the_penalty_is_pefts() -> None:
    model, theirs = _twins()
    ids = tokens(model)
    loss = model(ids, labels=ids).loss + penalty(model, "a")
    expected = theirs.base_model(ids, labels=ids).loss  # without a task type, PeftModel leaves the penalty out
    assert close(loss, expected)
    loss.backward()
    expected.backward()
    for delta, layer in _pairs(model, theirs):
        assert close(delta.A.grad, layer.lora_A["default"].grad, 1e-4)
        assert close(delta.B.grad, layer.lora_B["default"].grad, 1e-4)
        assert close(delta.E.grad, layer.lora_E["default"].grad, 1e-4)


def test_the_penalty_is_the_mean_of_norms_and_nothing_for_orthonormal_vectors() -> None:
    model = tiny("llama")
    lk.attach(model, AdaLoRA(rank_start=4, rank_target=2, orthogonality=0.3), name="a")
    eye = torch.eye(4).double()
    norms = [float((m.double() - eye).norm()) for d in _own(model) for m in (d.A @ d.A.T, d.B.T @ d.B)]
    assert float(penalty(model, "a")) == pytest.approx(0.3 * sum(norms) / len(norms), rel=1e-5)
    with torch.no_grad():
        for delta in _own(model):
            delta.A.copy_(torch.eye(*delta.A.shape))
            delta.B.copy_(torch.eye(*delta.B.shape))
    added = penalty(model, "a")
    assert float(added) == 0.0
    added.backward()
    assert all(bool(delta.A.grad.isfinite().all()) for delta in _own(model))
    lk.attach(model, AdaLoRA(orthogonality=0), name="free")
    assert penalty(model, "free") is None


def test_the_same_gradients_lead_to_pefts_masks() -> None:
    model, theirs = _twins()
    kept = []
    for step in range(1, STEPS + 1):
        before_step(model, "a", step, STEPS)
        for delta, layer in _pairs(model, theirs):
            for ours, other in ((delta.A, layer.lora_A), (delta.B, layer.lora_B), (delta.E, layer.lora_E)):
                ours.grad = torch.randn_like(ours) * torch.rand(())
                other["default"].grad = ours.grad.clone()
                ours.data -= 0.02 * ours.grad
                other["default"].data -= 0.02 * ours.grad
        after_step(model, "a", step, STEPS)
        theirs.base_model.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        for delta, layer in _pairs(model, theirs):
            assert torch.equal(delta.E, layer.lora_E["default"]), step
            if pattern:
                assert delta.kept_R.tolist() == pattern[f"{delta.placement.path}.lora_E.default"]
        kept.append(sum(int(delta.kept_R.sum()) for delta in _own(model)))
    assert kept[:2] == [24, 24]
    assert kept[-5:] == [12] * 5
    assert sorted(kept, reverse=True) == kept
    assert len(set(kept)) > 2
    assert len({int(delta.kept_R.sum()) for delta in _own(model)}) > 1  # sites differ


def test_a_budget_of_everything_prunes_nothing() -> None:
    """PEFT's allocator fails here: it asks for the zeroth smallest score."""
    model = tiny("llama")
    lk.attach(model, AdaLoRA(rank_start=4, rank_target=4, warmup=0, final=0, every=1), name="a")
    _train(model, range(1, 4), 3)
    assert all(bool(delta.kept_R.all()) for delta in _own(model))


def _train(model: nn.Module, steps: range, total: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    ids = tokens(model)
    optimizer = optimizer or torch.optim.AdamW(lk.parameters(model, "a"), lr=0.02)
    for step in steps:
        before_step(model, "a", step, total)
        added = penalty(model, "a")
        loss = model(ids, labels=ids).loss
        (loss if added is None else loss + added).backward()
        optimizer.step()
        after_step(model, "a", step, total)
        optimizer.zero_grad()


def test_pruning_keeps_the_vectors_and_a_triplet_may_return() -> None:
    model = tiny("llama")
    lk.attach(model, AdaLoRA(rank_start=4, rank_target=2, warmup=0, final=1, every=1), name="a")
    own, vectors = _own(model), [(delta.A.detach().clone(), delta.B.detach().clone()) for delta in _own(model)]
    for which in (slice(0, 2), slice(2, 4), slice(1, 3)):
        for delta in own:
            delta.A.grad, delta.B.grad, delta.E.grad = (torch.zeros_like(v) for v in (delta.A, delta.B, delta.E))
            delta.E.data += 0.1  # as the optimiser moves what was pruned, too
            delta.E.grad[which] = 1e3 * (1 + torch.rand(2, 1))
            delta.sensitivity_E.zero_()
        after_step(model, "a", 998, 1000)  # the budget is 2 a site by then
        expected = [which.start <= number < which.stop for number in range(4)]
        assert all(delta.kept_R.tolist() == expected for delta in own)
        assert all((delta.E.flatten() != 0).tolist() == expected for delta in own)
    for delta, (a, b) in zip(own, vectors, strict=True):
        assert torch.equal(delta.A, a)
        assert torch.equal(delta.B, b)


def test_the_final_steps_hold_the_choice() -> None:
    model = tiny("llama")
    lk.attach(model, AdaLoRA(rank_start=4, rank_target=2, **SCHEDULE), name="a")
    optimizer = torch.optim.AdamW(lk.parameters(model, "a"), lr=0.02)
    _train(model, range(1, 13), STEPS, optimizer)
    frozen = {key: value.clone() for key, value in adapter_buffers(model, "a").items()}
    assert sum(int(delta.kept_R.sum()) for delta in _own(model)) == 8
    _train(model, range(13, 17), STEPS, optimizer)
    assert all(torch.equal(value, frozen[key]) for key, value in adapter_buffers(model, "a").items())
    assert all(torch.equal(delta.E.flatten() != 0, delta.kept_R) for delta in _own(model))


def test_a_fresh_one_starts_as_the_paper_says() -> None:
    model = tiny("llama", hidden_size=256)
    lk.attach(model, AdaLoRA(alpha=24), name="a")
    for delta in _own(model):
        assert bool((delta.E == 0).all())
        assert float(delta.A.std()) == pytest.approx(0.02, rel=0.1)
        assert float(delta.B.std()) == pytest.approx(0.02, rel=0.1)
        assert delta.scale == 24 / (12 + 1e-5)
        assert (delta.A.shape[0], delta.E.shape, delta.B.shape[1]) == (12, (12, 1), 12)


def _pruned(family: str, targets: str = "attn.q,attn.v") -> nn.Module:
    """A model whose sites have kept different numbers of triplets, one of them none."""
    model = tiny(family)
    lk.attach(model, AdaLoRA(rank_start=6, rank_target=3, targets=targets), name="a")
    scramble(model, "a", std=0.3)
    with torch.no_grad():
        for number, delta in enumerate(_own(model)):
            delta.keep(torch.rand(6) < number / 4 if number else torch.zeros(6).bool())
            delta.prune()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("training", [False, True])
def test_a_file_holds_the_kept_triplets_and_both_read_it(family: str, training: bool, tmp_path: Path) -> None:
    model = _pruned(family).train(training)
    lk.save(model, "a", tmp_path / "a")
    expected = output(model.eval())
    again = tiny(family)
    lk.load(again, tmp_path / "a")
    assert torch.equal(output(again), expected)
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    assert close(output(theirs), expected)
    lk.save(again, "a", tmp_path / "b")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tensors = load_file(tmp_path / "a" / TENSORS)
    assert len({len(value) for key, value in tensors.items() if key.endswith("lora_A")}) > 1
    if family != "gpt2":  # the slices of a fused layer hold as many as the longest
        kept = [max(1, int(delta.kept_R.sum())) for delta in _own(model)]
        path = "base_model.model." + _own(model)[1].placement.path
        assert sum(len(value) for key, value in tensors.items() if key.endswith("lora_A")) == sum(kept)
        assert tensors[f"{path}.lora_B"].shape[1] == len(tensors[f"{path}.lora_E"]) == kept[1]


def test_a_file_between_two_choices_holds_what_acts(tmp_path: Path) -> None:
    model = _pruned("llama")
    with torch.no_grad():
        _own(model)[0].E[4] = 0.5  # pruned, but the optimiser has moved it since
    expected = output(model)
    lk.save(model, "a", tmp_path / "a")
    again = tiny("llama")
    lk.load(again, tmp_path / "a")
    assert torch.equal(output(again), expected)
    assert close(output(PeftModel.from_pretrained(tiny("llama"), tmp_path / "a").eval()), expected)


def test_merging_a_pruned_adapter() -> None:
    model = _pruned("gpt2", "attention")
    expected = output(model)
    lk.merge(model, "a")
    assert close(output(model), expected)


def test_convolutions(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, bias=False)), torch.randn(2, 4, 9, 9)
    lk.attach(model, AdaLoRA(rank_start=4, rank_target=2, targets="0"), name="a")
    scramble(model, "a", std=0.3)
    expected = model(x)
    lk.save(model, "a", tmp_path / "a")
    lk.load(model, tmp_path / "a", "again")
    assert torch.equal(model(x), expected)
    lk.merge(model, "a")
    assert close(model(x), expected)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", dict(init_r=6, target_r=2, lora_alpha=20)),
        ("llama", dict(target_modules=["q_proj", "down_proj"], lora_dropout=0.1, tinit=3, tfinal=4, deltaT=2)),
        ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_alpha=-1)),
        ("bert", dict(target_modules=["query"], bias="lora_only")),
    ],
)
def test_we_load_what_peft_writes(family: str, fields: dict, tmp_path: Path) -> None:
    theirs = _theirs(family, **fields)
    theirs.save_pretrained(tmp_path / "a")
    model = tiny(family)
    lk.load(model, tmp_path / "a")
    assert close(output(model), output(theirs))
    lk.save(model, "a", tmp_path / "b")
    assert close(output(PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()), output(theirs))


def test_we_load_what_peft_has_pruned(tmp_path: Path) -> None:
    theirs = _theirs(init_r=4, target_r=1, tinit=1, tfinal=2)
    names = sorted(name for name, _ in theirs.named_parameters() if "lora_E" in name)
    kept = [True] * 4, [False, True, False, True], [False] * 4, [True, False, False, False]
    patterns = dict(zip(names, kept, strict=True))
    config = theirs.peft_config["default"]
    config.rank_pattern = {name.removeprefix("base_model.model."): mask for name, mask in patterns.items()}
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, config.rank_pattern)
    expected = output(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = tiny("llama")
    lk.load(model, tmp_path / "a")
    assert close(output(model), expected)
    assert sorted(int(delta.kept_R.sum()) for delta in _own(model)) == [0, 1, 2, 4]
    lk.save(model, "a", tmp_path / "b")  # and back again
    assert close(output(PeftModel.from_pretrained(tiny("llama"), tmp_path / "b").eval()), expected)


@pytest.mark.parametrize(
    ("config", "drop", "words"),
    [
        (dict(init_r=8), "", "6 triplets, its config says 8 of 8"),
        (dict(init_r="8"), "", "bad init_r"),
        (dict(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True] * 5 + [False]}), "", "says 5 of 6"),
        (dict(rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True] * 6 + [False]}), "", "says 6 of 6"),
        (dict(beta1=1.5), "", "beta1=1.5"),
        ({}, "lora_E", "lora_E is missing"),
        ({}, "lora_A", "is not part of it"),
    ],
)
def test_faults_of_a_peft_folder_are_named(config: dict, drop: str, words: str, tmp_path: Path) -> None:
    _theirs(init_r=6, target_r=2).save_pretrained(tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text()) | config
    (tmp_path / CONFIG).write_text(json.dumps(told))
    tensors = load_file(tmp_path / TENSORS)
    if drop:
        del tensors[f"base_model.model.model.layers.1.self_attn.v_proj.{drop}"]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("llama"), tmp_path)


def test_our_own_file_with_a_fault_is_refused(tmp_path: Path) -> None:
    lk.save(_pruned("llama"), "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / TENSORS)
    with open(tmp_path / "a" / TENSORS, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    name = next(key for key in tensors if key.endswith("lora_A"))
    tensors[name] = torch.zeros(7, 32)
    save_file(tensors, tmp_path / "a" / TENSORS, metadata=metadata)
    with pytest.raises(BadAdapterFile, match=r"shape \(7, 32\)"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_a_loaded_adapter_has_room_to_learn_in(tmp_path: Path) -> None:
    lk.save(_pruned("llama"), "a", tmp_path / "a")
    model = tiny("llama")
    state = torch.get_rng_state()
    lk.load(model, tmp_path / "a", trainable=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((delta.A.norm(dim=1) > 0).all() and (delta.B.norm(dim=0) > 0).all()) for delta in _own(model))
    output(model.train()).pow(2).mean().backward()
    assert all(bool((delta.E.grad != 0).all()) for delta in _own(model))


def test_a_resumed_run_has_the_same_bits() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny("llama")
        torch.manual_seed(1)
        lk.attach(model, AdaLoRA(rank_start=4, rank_target=2, **SCHEDULE), name="a")
        return model.train(), torch.optim.AdamW(lk.parameters(model, "a"), lr=0.02)

    whole, optimizer = fresh()
    _train(whole, range(1, 8), STEPS, optimizer)
    resumed, its = fresh()
    with torch.no_grad():
        for listed in (adapter_tensors, adapter_buffers):
            for key, value in listed(resumed, "a").items():
                value.copy_(listed(whole, "a")[key])
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, own in ((whole, optimizer), (resumed, its)):
        _train(model, range(8, STEPS + 1), STEPS, own)
    for listed in (adapter_tensors, adapter_buffers):
        other = listed(resumed, "a")
        assert all(torch.equal(value, other[key]) for key, value in listed(whole, "a").items())
    assert sum(int(delta.kept_R.sum()) for delta in _own(whole)) == 8


@pytest.mark.parametrize("kind", [AdaLoRA, DynamicLoRA])
def test_a_pruned_adapter_is_read_beside_a_model_without_values(kind: type[Budgeted], tmp_path: Path) -> None:
    model = tiny("gpt2")
    lk.attach(model, kind(), name="a")
    scramble(model, "a")
    with torch.no_grad():
        for delta in directions(deltas_of(model, "a")):
            delta.keep(torch.arange(12) % 3 == 1)
            delta.prune()
    lk.save(model, "a", tmp_path / "a")
    lk.load(model, tmp_path / "a", "again")
    skeleton = tiny("gpt2").to("meta")
    _, found = files.fitted(skeleton, tmp_path / "a", files.read(tmp_path / "a"), any_base=True, device="cpu")
    for (_, delta), other in zip(found, deltas_of(model, "again"), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(delta.parameters(), other.parameters(), strict=True))
        assert all(torch.equal(one, two) for one, two in zip(delta.buffers(), other.buffers(), strict=True))
