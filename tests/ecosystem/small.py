"""A tiny model with an adapter and rows to learn, and what has to be true after someone else's loop trained it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core.state import adapter_tensors
from tests.laws.cases import bits
from tests.tiny import tiny

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def adapted(family: str = "llama", **size: Any) -> PreTrainedModel:
    """A tiny model with a fresh adapter "a" on every linear layer."""
    torch.manual_seed(0)
    model = tiny(family, **size)
    lk.attach(model, lk.LoRA(rank=4, targets="linear", train="classifier" if size.get("labels") else ()), name="a")
    return model


def rows(count: int = 24, length: int = 8) -> list[dict[str, list[int]]]:
    """Token ids that count upwards from several starts: easy to learn."""
    ids = [[3 + (start + step) % 50 for step in range(length)] for start in range(count)]
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in ids]


def tensors(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch."""
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


@torch.no_grad()
def loss_of(model: PreTrainedModel) -> float:
    """The mean loss on all rows; leaves the model in eval mode."""
    return float(model.eval()(**tensors(rows())).loss)


@contextmanager
def only_the_adapter_learns(model: PreTrainedModel, name: str = "a") -> Iterator[None]:
    """Check that what happens inside trains the adapter, and nothing else, to a lower loss."""
    loss, before, kind = loss_of(model), bits(model), type(model)
    own = {key: id(value) for key, value in adapter_tensors(model, name).items()}
    yield
    assert type(model) is kind
    assert loss_of(model) < 0.9 * loss
    assert {key: id(value) for key, value in adapter_tensors(model, name).items()} == own
    for path, value in model.named_parameters():
        assert torch.equal(value, before[path]) == (id(value) not in own.values()), path
    assert model.state_dict().keys() == before.keys()
    assert {path for path, p in model.named_parameters() if p.requires_grad} == {
        path for path in before if ".adapters." in path
    }
    gc.collect()  # trainers and their models hold each other


def keys_of(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def files_in(folder: Path) -> set[str]:
    """Paths of the files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
