from __future__ import annotations

import logging
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import lorakit as lk
from lorakit import train
from lorakit.errors import BadModel, OutOfMemory
from lorakit.kernels import cross_entropy
from lorakit.train import Train, head
from lorakit.train.loss import loss_for
from lorakit.train.padded import picked_backward, whole_backward
from lorakit.train.portions import Loss, Portion
from tests.tiny import tiny
from tests.train.small import adapted, collate, examples, feed

BATCH = collate(examples(6), 0)
ROWS = Portion(BATCH, len(BATCH.ids_BT), int((BATCH.labels_BT[:, 1:] != -100).sum()), BATCH.ids_BT.numel())
CAPPED = {"gemma2": {"head_dim": 8, "num_key_value_heads": 2}, "granite": {"logits_scaling": 4.0}}


def found_for(model: Any, **settings: Any) -> Loss:
    return loss_for(model, feed(examples(6)), Train(**settings))


def gradients(model: Any, how: Any, *portions: Portion, total: int = 7) -> tuple[float, torch.Tensor]:
    summed = sum(how(model, portion, total) for portion in portions or (ROWS,))
    found = torch.cat([p.grad.flatten() for p in lk.parameters(model) if p.grad is not None])
    model.zero_grad()
    return summed, found


def moved(family: str, targets: tuple[str, ...] = ("attn.q", "attn.v"), **fields: Any) -> Any:
    """A tiny model whose adapter is away from zero."""
    model = tiny(family, **fields)
    lk.attach(model, lk.LoRA(rank=2, targets=targets), name="a")
    torch.manual_seed(0)
    for parameter in lk.parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("targets", [("attn.q", "attn.v"), ("head",), ("attn.q", "head")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_head_on_labelled_positions_gives_the_models_own_loss(
    family: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 5)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 5)
    model = moved(family, targets)
    own = model(input_ids=BATCH.ids_BT, attention_mask=BATCH.attention_BT, labels=BATCH.labels_BT).loss
    picked, whole = gradients(model, picked_backward), gradients(model, whole_backward)
    assert picked[0] == pytest.approx(whole[0], rel=1e-5)
    assert picked[0] / ROWS.labelled == pytest.approx(own.item(), rel=1e-5)
    torch.testing.assert_close(picked[1], whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_known_families_take_the_fast_loss(family: str) -> None:
    assert "flat" in found_for(tiny(family)).reads


@pytest.mark.parametrize("family", CAPPED)
def test_a_model_that_changes_its_logits_takes_the_slow_loss_and_says_so(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = tiny_of(family)
    with caplog.at_level(logging.WARNING):
        assert "whole logits" in found_for(model).reads
    assert type(model).__name__ in caplog.text


def tiny_of(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=4, **CAPPED[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("padding", [True, False])
def test_a_classifiers_loss_is_smoothed_too(padding: bool) -> None:
    losses = []
    for smoothing in (0.0, 0.5):
        model = tiny("bert", labels=2)
        lk.attach(model, lk.LoRA(rank=2, train=("classifier",)), name="a")
        settings = Train(steps=1, label_smoothing=smoothing, padding=padding)
        losses.append(next(train.run(model, feed(examples(6, labels=2)), settings, name="a")).loss)
    assert losses[0] != losses[1]


def test_blocks_that_cannot_be_computed_again_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(BadModel, match="cannot compute its blocks again"):
        train.run(model, feed(), Train(steps=1, checkpointing="blocks"), name="a")


def test_an_optimiser_without_room_for_its_moments_says_so() -> None:
    model = adapted()
    steps = train.run(model, feed(), Train(steps=2), name="a")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", Mock(side_effect=torch.OutOfMemoryError("no room")))
        with pytest.raises(OutOfMemory, match="moments do not fit"):
            next(steps)


def test_an_encoder_with_a_decoder_is_refused_in_a_sentence() -> None:
    model = tiny("t5")
    lk.attach(model, lk.LoRA(rank=2), name="a")
    with pytest.raises(BadModel, match="reads by an encoder and writes by a decoder"):
        next(train.run(model, feed(examples(6)), Train(steps=1), name="a"))


def test_a_bfloat16_model_trains() -> None:
    model = adapted(dtype=torch.bfloat16)
    steps = list(train.run(model, feed(), Train(steps=30, batch_size=20, learning_rate=2e-2), name="a"))
    assert steps[-1].loss < 0.9 * steps[0].loss
