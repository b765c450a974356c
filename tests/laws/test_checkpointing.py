"""Gradient checkpointing: a recomputed forward runs under the routing it first ran with, or backward raises."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

import lorakit as lk
from lorakit.errors import BadState
from tests.laws.cases import CORE, adapted, close, every_case, every_dtype, output

ROUTINGS = {"none": None, "one": "a", "rows": ["a", None, "b"], "mixture": {"a": 0.5, "b": 0.5}}
reentrant = pytest.mark.parametrize("reentrant", [False, True])


def _model(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    checkpointed: bool,
    reentrant: bool = False,
    method: str = "lora-linear",
):
    model = adapted(family, method, dtype, "a", "b").train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def _gradients(model) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in lk.parameters(model)]


@pytest.mark.filterwarnings("ignore")
@reentrant
@every_dtype
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("what", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("backward", ["inside", "outside", "after another"])
def test_gradients_are_those_without_checkpointing(
    family: str, dtype: torch.dtype, what: object, backward: str, reentrant: bool
) -> None:
    if what is None:
        what = "b" if backward == "inside" else ["b", "b", None]  # the base alone has no gradients
    torch.manual_seed(0)
    plain = _model(family, dtype, checkpointed=False)
    torch.manual_seed(0)
    model = _model(family, dtype, checkpointed=True, reentrant=reentrant)
    with lk.use(plain, what):
        output(plain).pow(2).mean().backward()
    with lk.use(model, what):
        loss = output(model).pow(2).mean()
        if backward == "inside":
            loss.backward()
    with lk.use(model, "a") if backward == "after another" else contextlib.nullcontext():
        if backward != "inside":
            loss.backward()
    assert any(gradient.abs().sum() > 0 for gradient in _gradients(plain))
    for one, other in zip(_gradients(model), _gradients(plain), strict=True):
        assert torch.equal(one, other) or close(one, other)


@pytest.mark.filterwarnings("ignore")
@reentrant
@every_case
def test_every_method_is_recomputed_as_it_ran(family: str, method: str, reentrant: bool) -> None:
    if family == "deberta-v2" and reentrant and method.startswith(("full", "compacter")):
        pytest.skip("the blocks share what is trained of the relative embeddings, so that the plain model fails, too")
    plain = _model(family, checkpointed=False, method=method)
    model = _model(family, checkpointed=True, reentrant=reentrant, method=method)
    model.load_state_dict(plain.state_dict())
    with lk.use(plain, "a"):
        output(plain).pow(2).mean().backward()
    with lk.use(model, "a"):
        loss = output(model).pow(2).mean()
    loss.backward()  # where b is in force
    for one, other in zip(_gradients(model), _gradients(plain), strict=True):
        assert torch.equal(one, other) or close(one, other)


@pytest.mark.filterwarnings("ignore")
@reentrant
def test_two_routings_awaiting_backward_raise_rather_than_mix(reentrant: bool) -> None:
    model = _model("llama", checkpointed=True, reentrant=reentrant)
    with lk.use(model, "a"):
        first = output(model).pow(2).mean()
    with lk.use(model, "b"):
        second = output(model).pow(2).mean()
    with pytest.raises((BadState, CheckpointError)):
        (first + second).backward()
    with lk.use(model, "a"):  # and the next step is well again
        output(model).pow(2).mean().backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["a", ["a", "b", None], {"a": 0.5, "b": 0.5}], ids=["one", "rows", "mixture"])
def test_equal_routings_may_await_backward_together(what: object) -> None:
    model = _model("llama", checkpointed=True)
    losses = []
    for _ in range(2):
        with lk.use(model, what):
            losses.append(output(model).pow(2).mean())
    sum(losses).backward()
    assert any(gradient.abs().sum() > 0 for gradient in _gradients(model))


@pytest.mark.filterwarnings("ignore")
@reentrant
def test_a_later_forward_of_another_adapter_never_changes_what_is_recomputed(reentrant: bool) -> None:
    model = _model("llama", checkpointed=True, reentrant=reentrant)
    with lk.use(model, "a"):
        first, second = (output(model).pow(2).mean() for _ in range(2))
    first.backward()
    with lk.use(model, "b"):
        output(model)
    with pytest.raises((BadState, CheckpointError)):
        second.backward()


@pytest.mark.filterwarnings("ignore")
@reentrant
def test_ordinary_steps_before_checkpointing_is_switched_on_do_not_count(reentrant: bool) -> None:
    model = _model("llama", checkpointed=False)
    for name in "ab":
        with lk.use(model, name):
            output(model).pow(2).mean().backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with lk.use(model, "a"):
        output(model).pow(2).mean().backward()


@pytest.mark.filterwarnings("ignore")
def test_a_model_in_evaluation_mode_is_recomputed_as_it_ran() -> None:
    model = adapted("llama", "lora-linear", torch.float32, "a", "b")
    layer, x = model.model.layers[0].mlp, torch.randn(2, 5, 32, requires_grad=True)
    found = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=False)):
        with lk.use(model, "a"):
            y = run()
        x.grad = None
        y.pow(2).sum().backward()  # outside of the block, where b is in force
        found.append(x.grad.clone())
    assert close(*found)


@pytest.mark.filterwarnings("ignore")
def test_tasks_in_turn_train_under_checkpointing() -> None:
    model, plain = _model("llama", checkpointed=True), None
    torch.manual_seed(0)
    plain = _model("llama", checkpointed=False)
    plain.load_state_dict(model.state_dict())
    for name in ("a", "b", "a"):
        for each in (model, plain):
            with lk.use(each, name):
                output(each).pow(2).mean().backward()
    for one, other in zip(_gradients(model), _gradients(plain), strict=True):
        assert close(one, other)
