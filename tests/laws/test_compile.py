"""Adapters run inside `torch.compile(fullgraph=True)`, and another assignment of rows compiles nothing again."""

from __future__ import annotations

import random

import pytest
import torch

import lorakit as lk
from lorakit.core.state import idle
from tests.laws.cases import CORE, DTYPES, adapted, close, every_long_case, output
from tests.tiny import inputs, tokens


@every_long_case
def test_every_method_compiles(family: str, method: str) -> None:
    torch._dynamo.reset()
    model = adapted(family, method)
    with torch.no_grad():
        expected = output(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert close(compiled(**inputs(model))[0], expected)


@pytest.mark.parametrize("family", [CORE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CORE[1:])])
@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.slow)], ids=("fp32", "bf16"))
@pytest.mark.parametrize(
    "what", [None, "a", ["a", None, "b"], {"a": 0.5, "b": 0.5}], ids=["none", "one", "rows", "mixture"]
)
def test_compiled_equals_eager(family: str, what: object, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = adapted(family, "lora", dtype, "a", "b")
    with lk.use(model, what), torch.no_grad():
        expected = output(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert close(compiled(tokens(model))[0], expected, 1e-5 if dtype is torch.float32 else 0.05)


def test_twenty_assignments_of_rows_compile_once() -> None:
    torch._dynamo.reset()
    model, graphs = adapted("llama", "lora", torch.float32, "a", "b"), []

    def counting(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    choice = random.Random(0)
    for _ in range(20):
        with lk.use(model, choice.choices(["a", "b", None], k=3)), torch.no_grad():
            assert close(compiled(tokens(model))[0], output(model))
    assert len(graphs) == 1


def test_deltas_of_a_compiled_forward_are_not_taken_for_idle() -> None:
    torch._dynamo.reset()
    model = adapted("llama", "lora").train()
    for layer in model.model.layers[:1]:
        layer.compile(fullgraph=True, backend="aot_eager")
    output(model).pow(2).mean().backward()
    assert idle(model, "a") == []


def test_a_compiled_model_trains() -> None:
    torch._dynamo.reset()
    model = adapted("llama", "lora").train()
    output(model).pow(2).mean().backward()
    expected = [p.grad.clone() for p in lk.parameters(model)]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens(model))[0].pow(2).mean().backward()
    for one, other in zip(lk.parameters(model), expected, strict=True):
        assert close(one.grad, other, 1e-4)
