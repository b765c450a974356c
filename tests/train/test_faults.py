"""Numbers that are not finite, memory that does not suffice, and damaged files: nothing is lost."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit import train
from lorakit.errors import Diverged, LorakitError, OutOfMemory
from lorakit.train import flat, padded
from lorakit.train.checkpoint import newest
from tests.train.small import SETTINGS, adapted, feed

ADAM = replace(SETTINGS, steps=6, accumulate=1, batch_size=6)


def broken_from(model: Any, step: int, how: Any) -> None:
    """From this training step on, the second layer's values are broken by `how`."""
    passes = {"count": 0}

    def count(module: Any, args: Any, output: Any) -> None:
        passes["count"] += model.training

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return how(output) if passes["count"] >= step - 1 and model.training else None

    model.model.norm.register_forward_hook(count)
    model.model.layers[1].self_attn.v_proj.register_forward_hook(spoil)


@pytest.mark.parametrize("padding", [True, False])
def test_a_loss_that_is_not_finite_names_batch_and_module_and_keeps_the_last_good_state(
    tmp_path: Path, padding: bool
) -> None:
    model, whole = adapted(dropout=0.0), adapted(dropout=0.0)
    settings = replace(ADAM, padding=padding, checkpoint_every=0)
    broken_from(model, 4, lambda y: y * float("nan"))
    with pytest.raises(Diverged, match=r"step 4 .*in the batch of examples \d+, .*layers\.1\.self_attn\.v_proj"):
        list(train.run(model, feed(), settings, name="a", out=tmp_path))
    found = newest(tmp_path / "checkpoints")
    assert found is not None and found.step == 3
    for step in train.run(whole, feed(), settings, name="a"):
        if step.step == 3:
            break
    for mine, theirs in zip(lk.parameters(model), lk.parameters(whole), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6) and mine.grad is None  # a watched layer is plain
    resumed = adapted(dropout=0.0)
    assert [s.step for s in train.run(resumed, feed(), settings, name="a", out=tmp_path, resume=True)] == [4, 5, 6]


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = adapted(dropout=0.0)
    broken_from(model, 2, lambda y: _Poison.apply(y))
    with pytest.raises(Diverged, match=r"all outputs are finite, but the gradient of model\.layers\.[01]\.self_attn"):
        list(train.run(model, feed(), ADAM, name="a"))


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def too_large(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """A machine whose memory suffices for so many places."""
    for module, name in ((flat, "backward"), (padded, "picked_backward")):
        real = getattr(module, name)

        def limited(model: Any, portion: Any, *given: Any, real: Any = real, **told: Any) -> float:
            summed: float = real(model, portion, *given, **told)
            if portion.computed > most:
                raise error
            return summed

        monkeypatch.setattr(module, name, limited)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_does_not_fit_is_divided_with_the_same_result(
    padding: bool, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(ADAM, padding=padding)
    whole, divided = adapted(dropout=0.0), adapted(dropout=0.0)
    expected = [step.loss for step in train.run(whole, feed(), settings, name="a")]
    too_large(monkeypatch, 20, error)
    with caplog.at_level(logging.WARNING):
        losses = [step.loss for step in train.run(divided, feed(), settings, name="a")]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert "from here on it has at most" in caplog.text
    for mine, theirs in zip(lk.parameters(divided), lk.parameters(whole), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_an_example_that_does_not_fit_ends_the_run_with_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(dropout=0.0)
    too_large(monkeypatch, 2, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    with pytest.raises(OutOfMemory, match="step 1 does not fit into memory, although each example"):
        list(train.run(model, feed(), ADAM, name="a", out=tmp_path))
    assert all(parameter.grad is None for parameter in lk.parameters(model))


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    too_large(monkeypatch, 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        list(train.run(adapted(), feed(), ADAM, name="a"))


def test_a_damaged_file_of_a_run_is_a_sentence(tmp_path: Path) -> None:
    list(train.run(adapted(), feed(), ADAM, name="a", out=tmp_path))
    metrics, training = tmp_path / "metrics.jsonl", tmp_path / "training.json"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:2], "\0\0\0\n", *lines[2:]]))
    with pytest.raises(LorakitError, match=r"metrics.jsonl, line 3, is damaged .*; remove that line"):
        list(train.run(adapted(), feed(), ADAM, name="a", out=tmp_path, resume=True))
    training.write_text(training.read_text()[:40])
    with pytest.raises(LorakitError, match=r"training.json is damaged .*; choose another output folder"):
        list(train.run(adapted(), feed(), ADAM, name="a", out=tmp_path, resume=True))
