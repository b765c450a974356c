"""Flat lines are rows without their padding: the same loss and gradients, with shared contexts or without."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit as lk
from lorakit import train
from lorakit.data import order
from lorakit.train import Feed, Train
from lorakit.train.loss import loss_for
from tests.laws.cases import METHODS
from tests.tiny import DECODERS, tiny
from tests.train.small import Encoded, collate

PADDED = {"gptj": "position|differ|segments", "gemma2": "logits"}  # what they are told about
FLAT = [family for family in DECODERS if family not in PADDED]
SETTINGS = Train(steps=3, batch_size=8, learning_rate=1e-2)


def shared(seed: int = 0) -> list[Encoded]:
    """Targets of a few contexts, and one that has a context for itself."""
    chance = random.Random(seed)
    found = []
    for length in (20, 31, 2):
        context = tuple(chance.randrange(3, 64) for _ in range(length))
        for _ in range(3):
            ids = context + tuple(chance.randrange(3, 64) for _ in range(chance.randrange(2, 8)))
            found.append(Encoded(ids, length))
    return found


def feed(encoded: list[Encoded] | None = None) -> Feed:
    return Feed(shared() if encoded is None else encoded, 0, collate, order)


def moved(family: str, method: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = tiny(family, dtype=dtype)
    lk.attach(model, method or lk.LoRA(rank=2, targets=("linear",)), name="a")
    with torch.no_grad():
        for parameter in lk.parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def gradients(model: Any, **settings: Any) -> tuple[float, torch.Tensor, int]:
    """The summed loss of one batch, all gradients, and the places that were computed."""
    chosen = replace(SETTINGS, **settings)
    with lk.use(model, None):
        loss = loss_for(model, feed(), chosen)
    portions = loss.portions(feed().examples, chosen.forward_tokens)
    model.zero_grad()
    summed = sum(loss.backward(model, portion, 10) for portion in portions)
    found = torch.cat([p.grad.flatten() for p in lk.parameters(model) if p.grad is not None])
    return summed, found, sum(portion.computed for portion in portions)


def assert_same(one: tuple[float, torch.Tensor, int], other: tuple[float, torch.Tensor, int]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert (one[1] - other[1]).abs().max() <= 1e-5 * other[1].abs().max()


@pytest.mark.parametrize("family", FLAT)
def test_padding_free_is_padded_and_grouped_is_apart(family: str) -> None:
    model = moved(family)
    rows, apart, grouped = gradients(model, padding=True), gradients(model, share_contexts=False), gradients(model)
    assert_same(apart, rows)
    assert_same(grouped, rows)
    assert grouped[2] < 0.6 * apart[2] < 0.6 * rows[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_flat_lines(method: str) -> None:
    model = moved("gpt2" if method == "bitfit" else "llama", METHODS[method])
    if any(METHODS[method].inserts):
        with lk.use(model, None):
            assert "rows" in loss_for(model, feed(), SETTINGS, inserts=True).reads
    else:
        assert_same(gradients(model), gradients(model, padding=True))


@pytest.mark.parametrize("tokens", [1, 40, 80])
@pytest.mark.parametrize("padding", [True, False])
def test_a_divided_batch_is_the_whole(tokens: int, padding: bool) -> None:
    model = moved("llama")
    assert_same(gradients(model, forward_tokens=tokens, padding=padding), gradients(model, padding=padding))


@pytest.mark.parametrize("family", PADDED)
def test_a_model_that_cannot_keep_segments_apart_reads_rows_and_says_so(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert "rows" in loss_for(tiny(family), feed(), SETTINGS).reads
    assert caplog.text


def test_a_window_shorter_than_an_example_needs_rows() -> None:
    config = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    for window, reads in ((30, "rows"), (64, "flat")):
        torch.manual_seed(0)
        settings = AutoConfig.for_model("mistral", **config, num_key_value_heads=2, sliding_window=window)
        assert reads in loss_for(AutoModelForCausalLM.from_config(settings).eval(), feed(), SETTINGS).reads


def test_a_method_that_inserts_places_reads_rows() -> None:
    model = tiny("llama")
    lk.attach(model, METHODS["prefix-embedding"], name="a")
    steps = list(train.run(model, feed(), SETTINGS, name="a"))
    assert all(step.computed >= step.tokens for step in steps)  # nothing is shared


def test_the_models_attention_is_its_own_between_steps() -> None:
    model = moved("llama")
    before = model.config._attn_implementation
    for _ in train.run(model, feed(), SETTINGS, name="a"):
        assert model.config._attn_implementation == before
    assert model.config._attn_implementation == before


def test_checkpointing_recomputes_segments() -> None:
    one, other = moved("llama"), moved("llama")
    for model, level in ((one, "none"), (other, "blocks")):
        for _ in train.run(model, feed(), replace(SETTINGS, checkpointing=level), name="a"):
            assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for mine, theirs in zip(lk.parameters(one), lk.parameters(other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_examples_of_one_context_come_together_and_are_computed_once() -> None:
    steps = list(train.run(moved("llama"), feed(), replace(SETTINGS, batch_size=6), name="a"))
    assert sum(step.computed for step in steps) < 0.7 * sum(step.tokens for step in steps)
    assert all(step.labelled for step in steps)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_pytorchs(smoothing: float) -> None:
    model = moved("llama")
    summed, found, _ = gradients(model, label_smoothing=smoothing)
    losses = []
    for example in feed().examples:
        logits = model(torch.tensor([example.ids])).logits[0, example.start - 1 : -1]
        wanted = torch.tensor(example.ids[example.start :])
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing))
    model.zero_grad()
    (torch.stack(losses).sum() / 10).backward()
    own = torch.cat([p.grad.flatten() for p in lk.parameters(model) if p.grad is not None])
    assert_same((summed, found, 0), (torch.stack(losses).sum().item(), own, 0))
