"""Under autocast, an adapted layer behaves as the layer itself does."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from tests.laws.cases import CORE, adapted, close, every_case, output


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("what", ["a", ["a", "b", None]], ids=["one", "rows"])
def test_autocast_runs_adapters_in_its_dtype_and_trains_the_masters(family: str, what: object) -> None:
    model = adapted(family, "lora-linear", torch.float32, "a", "b").train()
    with lk.use(model, what):
        exact = output(model)
        with torch.autocast("cpu", torch.bfloat16):
            cast = output(model)
        cast.float().pow(2).mean().backward()
    assert close(cast.float(), exact, 0.05)
    gradients = [p.grad for p in lk.parameters(model, "a")]
    assert all(gradient is not None and gradient.dtype is torch.float32 for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


@every_case
def test_every_method_runs_under_autocast(family: str, method: str) -> None:
    if family == "deberta":
        pytest.skip("its own code cannot run under autocast: it fills float32's least number into bf16 scores")
    model = adapted(family, method)
    exact = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output(model)
    assert close(cast.float(), exact, 0.1)
