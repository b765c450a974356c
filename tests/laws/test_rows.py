"""Several adapters in one batch: each row is as if it were alone."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch

import lorakit as lk
from lorakit.core.sites import ADAPTERS, unbatched
from lorakit.core.state import attached_to
from lorakit.errors import BadRouting, BadState
from lorakit.methods.combine import combine
from tests.laws.cases import (
    adapted,
    bits,
    close,
    every_case,
    every_dtype,
    method_named,
    output,
    same_bits,
    scramble,
    waived,
)
from tests.tiny import inputs, tiny, tokens


@every_case
@every_dtype
def test_rows_of_a_mixed_batch_equal_each_alone(family: str, method: str, dtype: torch.dtype) -> None:
    model, tolerance = adapted(family, method, dtype, "a", "b"), 1e-5 if dtype is torch.float32 else 0.05
    lk.attach(model, lk.LoRA(rank=3, targets="attn.o"), name="c")
    scramble(model, "c", seed=5)
    rows = ["b", None, "a", "c", "b"]
    if waived(method, "rows") or unbatched(model, [p.path for p in attached_to(model, "a").plan]):
        with pytest.raises(BadRouting, match="cannot share a batch"):
            lk.use(model, rows)
        rows = ["c", None, "c", "c", None]  # the others still can
    given = inputs(model, rows=len(rows))
    with lk.use(model, rows):
        mixed = output(model, given)
    for number, name in enumerate(rows):
        with lk.use(model, name):
            assert close(mixed[number], output(model, given)[number], tolerance)


@pytest.mark.parametrize("parts", [("lora", "dora"), ("dora", "ia3")])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_with_the_same_parts_in_another_order_share_a_batch(parts: tuple, compiled: bool) -> None:
    model = tiny("gpt2")
    for number, name in enumerate("ab"):
        lk.attach(model, combine(*(parts if name == "a" else parts[::-1])), name=name)
        scramble(model, name, seed=number)
    rows: list[str | None] = ["a", "b", None, "a"]
    given = inputs(model, rows=len(rows))
    with lk.use(model, rows), torch.no_grad():
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        mixed = run(**given)[0]
    for number, name in enumerate(rows):
        with lk.use(model, name):
            assert close(mixed[number], output(model, given)[number])


def test_rows_may_use_different_heads() -> None:
    model = tiny("bert", labels=3)
    for number, name in enumerate("ab"):
        lk.attach(model, lk.LoRA(rank=2, train="classifier"), name=name)
        scramble(model, name, seed=number)
    ids = tokens(model)
    with lk.use(model, ["a", None, "b"]):
        mixed = model(ids).logits
    for number, name in enumerate(("a", None, "b")):
        with lk.use(model, name):
            assert close(mixed[number], model(ids).logits[number])


def test_gradients_of_a_mixed_batch_reach_each_adapter_from_its_rows_alone() -> None:
    model = adapted("llama", "lora-linear", torch.float32, "a", "b").train()
    ids = tokens(model)
    with lk.use(model, ["a", "b", None]):
        output(model, ids).pow(2).sum().backward()
    together = [p.grad.clone() for p in lk.parameters(model, "a")]
    model.zero_grad()
    with lk.use(model, "a"):
        output(model, ids[:1]).pow(2).sum().backward()
    for one, alone in zip(together, lk.parameters(model, "a"), strict=True):
        assert close(one, alone.grad, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("extra", [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)])
def test_generate_repeats_the_rows_for_beams_and_sequences(family: str, extra: dict) -> None:
    model = adapted(family, "lora", torch.float32, "a", "b")
    ids, settings = tokens(model, rows=2), dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    if "num_beams" in extra:
        with lk.use(model, ["a", "b"]):
            mixed = model.generate(ids, **settings, **extra)
        for number, name in enumerate("ab"):
            with lk.use(model, name):
                assert torch.equal(mixed[number], model.generate(ids[number : number + 1], **settings, **extra)[0])
    else:
        with lk.use(model, ["a", "b"]):
            assert model.generate(ids, **settings, **extra).shape[0] == 4
    assert "generate" not in vars(model)


def test_a_batch_of_another_size_is_refused() -> None:
    model = adapted("llama", "lora", torch.float32, "a", "b")
    for rows in (["a", "b"], ["a"] * 4, ["a"]):
        with lk.use(model, rows), pytest.raises(BadRouting, match=r"names \d rows"):
            output(model, tokens(model, rows=3 if len(rows) != 1 else 2))
    with lk.use(model, ["a", "b"]), pytest.raises(BadRouting):
        output(model, tokens(model, rows=4))
    with pytest.raises(BadRouting, match="at least one"):
        lk.use(model, [])


@pytest.mark.parametrize("other", ["full-top2", "prefix-layer"])
def test_rows_stay_as_they_are_beside_an_adapter_that_cannot_share_a_batch(other: str) -> None:
    model = adapted("gpt2", "lora", torch.float32, "a", "b", "c")
    lk.attach(model, method_named(other), name="alone")
    rows = ["c", None, "a"]
    lk.use(model, rows)
    mixed = output(model)
    with lk.use(model, "alone"):
        output(model)
    assert torch.equal(output(model), mixed)
    lk.detach(model, "b")
    assert torch.equal(output(model), mixed)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_refuses_a_batch_that_its_beams_do_not_explain(family: str) -> None:
    model = adapted(family, "lora", torch.float32, "a", "b")
    for extra in (dict(), dict(num_beams=3)):
        with lk.use(model, ["a", "b"]), pytest.raises(BadRouting):
            model.generate(tokens(model, rows=4), max_new_tokens=2, pad_token_id=0, **extra)


def test_a_second_thread_is_refused_while_the_model_is_in_use() -> None:
    model, caught = adapted("llama", "lora"), []

    def other() -> None:
        try:
            lk.use(model, None)
        except BadState as error:
            caught.append(error)

    def gone() -> None:
        try:
            lk.detach(model, "a")
        except BadState as error:
            caught.append(error)

    def forward() -> None:
        try:
            output(twin)
            output(model)
        except BadState as error:
            caught.append(error)

    with lk.use(model, "a"):
        twin = copy.deepcopy(model)  # nobody's: it may be used anywhere
        for target in (other, gone, forward):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert [str(error).split(" has")[0] for error in caught] == ["another thread"] * 3
    lk.use(model, None)


@pytest.mark.parametrize("method", ["full", "prefix-layer", "lora-prefix-layer"])
def test_a_second_thread_is_refused_while_weights_or_places_are_put_in(method: str) -> None:
    """Without any block, too: what was put in is there for every thread."""
    model, caught = adapted("gpt2", method), []
    expected, before = output(model), bits(model)

    def forward() -> None:
        try:
            output(model)
        except BadState as error:
            caught.append(str(error))

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()

    modules = [module for module in model.modules() if ADAPTERS in module._modules]
    handles = [module.register_forward_pre_hook(meanwhile) for module in modules]
    assert torch.equal(output(model), expected)
    for handle in handles:
        handle.remove()
    assert len(caught) >= len(modules) > 0
    assert all(text.startswith("another thread has this model") for text in caught)
    assert same_bits(bits(model), before)
    caught.clear()
    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()
    assert not caught


@pytest.mark.parametrize("method", ["full", "prefix-layer"])
def test_a_thread_that_was_stopped_within_a_forward_leaves_the_model_free(method: str) -> None:
    model = adapted("gpt2", method)
    expected, before = output(model), bits(model)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt  # for which PyTorch calls no hook

    def forward() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            output(model)

    handle = model.transformer.h[1].ln_1.register_forward_pre_hook(stopped)
    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()
    handle.remove()
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), expected)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    assert torch.equal(output(model), expected)
    assert same_bits(bits(model), before)


def test_a_method_that_cannot_be_routed_says_so() -> None:
    model = adapted("llama", "lora", torch.float32, "a", "b")
    kind = type(next(d for d in model.modules() if hasattr(d, "placement")))
    kind.per_row = False
    try:
        with pytest.raises(BadRouting, match="cannot share a batch"):
            lk.use(model, ["a", "b", None])
    finally:
        kind.per_row = True
    assert method_named("lora") == lk.LoRA()
