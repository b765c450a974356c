"""A plain PyTorch loop, and accelerate's, train an attached model as they train any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core.state import adapter_tensors
from tests.ecosystem.small import adapted, loss_of, only_the_adapter_learns, rows, tensors

STEPS = 12


def batches() -> DataLoader:
    return DataLoader(rows(), batch_size=8, collate_fn=tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_loop_over_what_requires_a_gradient(family: str) -> None:
    model = adapted(family)
    with only_the_adapter_learns(model):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(STEPS // 3):
            for batch in batches():
                model.train()(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


def test_all_parameters_may_be_given_to_the_optimiser() -> None:
    model = adapted()
    with only_the_adapter_learns(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for batch in [tensors(rows())] * STEPS:
            model.train()(**batch).loss.backward()
            optimizer.step()
            model.zero_grad()


def test_an_adapter_that_is_not_in_force_does_not_learn() -> None:
    model = adapted()
    lk.attach(model, lk.LoRA(rank=2), name="resting", active=False)
    before = {key: value.clone() for key, value in adapter_tensors(model, "resting").items()}
    optimizer = torch.optim.AdamW(lk.parameters(model), lr=1e-2)
    model(**tensors(rows())).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in adapter_tensors(model, "resting").items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_an_attached_model(precision: str, tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True, mixed_precision=precision), adapted()
    with only_the_adapter_learns(model):
        optimizer = torch.optim.AdamW(lk.parameters(model, "a"), lr=1e-2)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, batches())
        for _ in range(STEPS // 3):
            for batch in loader:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared.train()(**batch).loss)
                    accelerator.clip_grad_norm_(lk.parameters(model, "a"), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        unwrapped: PreTrainedModel = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    lk.save(unwrapped, "a", tmp_path / "a")
    lk.load(unwrapped, tmp_path / "a", name="again")
    again = loss_of(unwrapped)
    with lk.use(unwrapped, "a"):
        assert loss_of(unwrapped) == again


def test_a_prepared_model_is_switched_and_routed_as_before() -> None:
    model = adapted()
    prepared = Accelerator(cpu=True).prepare(model)
    ids = tensors(rows(2))["input_ids"]
    with torch.no_grad(), lk.use(prepared, [None, "a"]):
        mixed = prepared(ids).logits
    with torch.no_grad(), lk.use(model, None):
        assert torch.equal(mixed[0], model(ids).logits[0])
