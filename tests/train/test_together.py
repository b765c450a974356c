"""Several adapters in one pass are what as many runs of their own would have made of them."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit import train
from lorakit.core.state import State, adapter_buffers, adapter_tensors, state_of
from lorakit.errors import BadState, Diverged, Interrupted, LorakitError, OutputExists
from lorakit.train import Train
from lorakit.train.metrics import read
from lorakit.train.together import Part, in_turn, together, view
from tests.laws.cases import CANNOT, METHODS, method_named, output
from tests.tiny import DECODERS, tiny
from tests.train.small import Encoded, examples, feed

SETTINGS = Train(steps=4, batch_size=3, accumulate=2, learning_rate=1e-2, checkpoint_every=2)
Numbers = dict[str, torch.Tensor]


def attached(methods: Mapping[str, lk.Method], family: str = "gpt2", **fields: Any) -> Any:
    model = tiny(family, **fields)
    for seed, (name, method) in enumerate(methods.items()):
        torch.manual_seed(seed)
        lk.attach(model, method, name)
    return model


def apart(methods: Mapping[str, lk.Method], name: str, family: str = "gpt2", **fields: Any) -> Any:
    """A model with this adapter alone, and the values that it has beside the others."""
    model = tiny(family, **fields)
    torch.manual_seed(list(methods).index(name))
    lk.attach(model, methods[name], name)
    return model


def parts_of(names: Iterable[str], **changes: Any) -> dict[str, Part]:
    """Runs that differ in everything in which they may."""
    return {
        name: Part(
            feed(examples(12 + number, seed=number)),
            replace(SETTINGS, steps=2 + number % 3, seed=number, learning_rate=1e-2 / (1 + number), **changes),
        )
        for number, name in enumerate(names)
    }


def numbers(model: Any, name: str) -> Numbers:
    found = adapter_tensors(model, name) | adapter_buffers(model, name)
    return {key: value.detach().clone() for key, value in found.items()}


def losses_of_own_run(model: Any, name: str, part: Part) -> list[float]:
    return [step.loss for step in train.run(model, part.feed, part.settings, name=name)]


def assert_equal_to_own_runs(methods: Mapping[str, lk.Method], parts: Mapping[str, Part], **of_model: Any) -> None:
    model = attached(methods, **of_model)
    losses: dict[str, list[float]] = {name: [] for name in parts}
    for name, step in together(model, parts):
        losses[name].append(step.loss)
    for name, part in parts.items():
        own = apart(methods, name, **of_model)
        before = numbers(own, name)
        assert losses_of_own_run(own, name, part) == losses[name], name
        ours, theirs = numbers(model, name), numbers(own, name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name
        assert any(not torch.equal(ours[key], before[key]) for key in ours), name


def test_all_methods_in_one_pass_equal_runs_of_their_own() -> None:
    assert_equal_to_own_runs(METHODS, parts_of(METHODS))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in DECODERS if family != "gpt2"])
def test_all_methods_in_one_pass_on_every_family(family: str) -> None:
    methods = {name: method for name, method in METHODS.items() if (family, name) not in CANNOT}
    assert_equal_to_own_runs(methods, parts_of(methods), family=family)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_neighbours_do_not_touch_each_other(family: str) -> None:
    """Neighbours on norms, the feed-forward layer, the head and in the sequence, which fast paths take note of."""
    names = ("lora", "lora-norm", "lora-linear", "full", "prefix-layer", "bottleneck", "dylora")
    methods = {name: method_named(name) for name in names if (family, name) not in CANNOT}
    methods |= {"head": lk.LoRA(rank=2, targets=("head", "attn.q"))}
    assert_equal_to_own_runs(methods, parts_of(methods), family=family)


def test_classifiers_with_heads_of_their_own() -> None:
    methods = {name: replace(METHODS[name], train=("classifier",)) for name in ("lora", "bitfit", "ia3")}
    parts = {name: replace(part, feed=feed(examples(12, labels=2))) for name, part in parts_of(methods).items()}
    assert_equal_to_own_runs(methods, parts, family="bert", labels=2)


LORAS = {name: lk.LoRA(rank=rank, dropout=0.1) for name, rank in (("a", 2), ("b", 4), ("c", 4))}


def folders(parts: Mapping[str, Part], out: Path, *, resume: bool = False) -> dict[str, Part]:
    return {name: replace(part, out=out / name, resume=resume) for name, part in parts.items()}


def same_numbers(one: Any, other: Any) -> bool:
    return all(
        torch.equal(value, numbers(other, name)[key]) for name in LORAS for key, value in numbers(one, name).items()
    )


def test_each_takes_one_step_a_round_until_its_last() -> None:
    taken = [(name, step.step) for name, step in together(attached(LORAS), parts_of(LORAS))]
    assert taken == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("c", 2), ("b", 3), ("c", 3), ("c", 4)]


def test_so_many_go_on_at_once() -> None:
    model, parts = attached(LORAS), parts_of(LORAS)
    runs = {name: train.run(view(model), part.feed, part.settings, name=name) for name, part in parts.items()}
    taken = [(name, step.step) for name, step in in_turn(runs, {}, at_once=2)]
    assert taken == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", 3), ("c", 1), ("c", 2), ("c", 3), ("c", 4)]


def test_the_model_is_the_callers_between_steps_and_after() -> None:
    model = attached(LORAS)
    lk.use(model, "b")
    model.lm_head.train()
    state: State = state_of(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    base = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    for _ in together(model, parts_of(LORAS)):
        assert state is state_of(model) and state.routing is not None and state.routing.names == ("b",)
        assert modes == [module.training for module in model.modules()]
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.items())


def test_what_was_trained_is_seen_in_an_evaluation_and_saved(tmp_path: Path) -> None:
    model, seen = attached(LORAS), []

    def evaluate() -> dict[str, float]:
        with lk.use(model, "a"), torch.no_grad():
            seen.append(output(model))
        return {"drawn": torch.rand(()).item()}

    parts = parts_of(LORAS, evaluate_every=1)
    for _ in together(model, parts | {"a": replace(parts["a"], evaluate=evaluate)}):
        pass
    assert len(seen) == 2 and not torch.equal(*seen)
    lk.save(model, "a", tmp_path / "a")
    loaded = tiny("gpt2")
    lk.load(loaded, tmp_path / "a", name="a")
    assert torch.equal(output(loaded), seen[-1])


def test_one_that_fails_is_told_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    parts = parts_of(LORAS)
    wild = replace(parts["b"].settings, learning_rate=1e30, warmup_share=0.0)
    unlabelled = [*examples(6), *[Encoded((3, 4, 5), 3)] * 6]
    parts |= {"b": replace(parts["b"], settings=wild), "a": replace(parts["a"], feed=feed(unlabelled))}
    model = attached(LORAS)
    with caplog.at_level(logging.WARNING), pytest.raises(LorakitError, match="2 of 3 runs failed") as raised:
        for _ in together(model, parts):
            pass
    assert "a: step " in str(raised.value) and "without a labelled token" in str(raised.value)
    assert "b: step 2" in str(raised.value)
    assert isinstance(raised.value.__cause__, ExceptionGroup)
    assert any(isinstance(each, Diverged) for each in raised.value.__cause__.exceptions)
    assert "a fails, the others go on: step" in caplog.text
    own = apart(LORAS, "c")
    losses_of_own_run(own, "c", parts["c"])
    assert all(torch.equal(value, numbers(own, "c")[key]) for key, value in numbers(model, "c").items())


def test_each_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = attached(LORAS), attached(LORAS)
    parts = parts_of(LORAS)
    for _ in together(whole, parts):
        pass
    steps = together(stopped, folders(parts, tmp_path))
    for name, step in steps:
        if (name, step.step) == ("b", 3):  # a has ended, c has a checkpoint of step 2
            steps.close()
    resumed = attached(LORAS)
    taken = [(name, step.step) for name, step in together(resumed, folders(parts, tmp_path, resume=True))]
    assert taken == [("c", 3), ("c", 4)]
    assert same_numbers(whole, resumed)
    assert [[row["step"] for row in read(tmp_path / name)] for name in "abc"] == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_ctrl_c_leaves_a_checkpoint_of_each(tmp_path: Path) -> None:
    whole, parts = attached(LORAS), parts_of(LORAS, checkpoint_every=0)
    for _ in together(whole, parts):
        pass
    steps = together(attached(LORAS), folders(parts, tmp_path))
    with pytest.raises(Interrupted, match=r"3 runs have a checkpoint in their folders: .* --resume"):
        for name, step in steps:
            if (name, step.step) == ("c", 1):
                steps.throw(KeyboardInterrupt())
    resumed = attached(LORAS)
    taken = [(name, step.step) for name, step in together(resumed, folders(parts, tmp_path, resume=True))]
    assert taken[:2] == [("a", 2), ("b", 2)] and same_numbers(whole, resumed)


def test_ctrl_c_within_a_step_lets_it_be_taken(tmp_path: Path) -> None:
    model, passes = attached(LORAS), itertools.count(1)

    def press(module: Any, *_: Any) -> None:
        if module.training and next(passes) == 4:  # the last of b's first step
            signal.raise_signal(signal.SIGINT)

    model.transformer.register_forward_hook(press)
    with pytest.raises(Interrupted, match="2 runs have a checkpoint"):
        for _ in together(model, folders(parts_of(LORAS), tmp_path)):
            pass
    assert [[row["step"] for row in read(tmp_path / name)] for name in "ab"] == [[1], [1]]


def test_ctrl_c_without_folders_is_the_callers() -> None:
    steps = together(attached(LORAS), parts_of(LORAS))
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())


def test_mistakes_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    model, parts = attached(LORAS), parts_of(LORAS)
    before = numbers(model, "a")
    same = {name: replace(part, out=tmp_path / "same") for name, part in parts.items()}
    with pytest.raises(OutputExists, match=r"several runs have the folder .*same"):
        together(model, same)
    with pytest.raises(LorakitError, match="no adapter is called 'd'"):
        together(model, parts | {"d": parts["a"]})
    for parameter in lk.parameters(model, "c"):
        parameter.requires_grad_(False)
    with pytest.raises(BadState, match="'c' has no trainable parameter"):
        together(model, parts)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, numbers(model, "a")[key]) for key, value in before.items())


def test_what_is_attached_to_a_view_is_not_attached_to_the_model() -> None:
    model = tiny("llama")
    wanted, keys = output(model), list(model.state_dict())
    other = view(model)
    lk.attach(other, lk.LoRA(rank=2), name="a")
    with torch.no_grad():
        for parameter in lk.parameters(other, "a"):
            parameter.add_(0.1)
    assert not torch.equal(output(other), wanted)
    assert torch.equal(output(model), wanted) and list(model.state_dict()) == keys
    assert {id(parameter) for parameter in model.parameters()} < {id(parameter) for parameter in other.parameters()}
