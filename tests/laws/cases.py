"""What every law runs on: each method in `methods/`, some variants of LoRA, each family, float32 and bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core import registry
from lorakit.core.method import Method, method_called
from lorakit.core.state import adapter_tensors
from tests.tiny import tiny, tokens

FAMILIES = ("llama", "gpt2", "bert", "roberta")
DTYPES = (torch.float32, torch.bfloat16)
METHODS: dict[str, Method] = {name: method_called(name)() for name in registry.names("lorakit.methods")}
VARIANTS: dict[str, Method] = {
    "lora-linear": lk.LoRA(rank=4, targets="linear", init="gaussian", scaling="alpha/sqrt(r)"),
    "lora-ranks": lk.LoRA(rank=4, targets="attention", ranks={"attn.v": 2, "attn.o": 6}, alphas={"attn.q": 4.0}),
    "lora-embed": lk.LoRA(rank=4, targets="embed,attn.q"),
    "lora-bias": lk.LoRA(rank=4, targets="mlp.up,attn.o", bias="all"),
    "lora-norm": lk.LoRA(rank=4, targets="mlp.up", train="norm.mlp"),
}
WITHOUT_BIAS = ("llama",)  # families that have no bias to train

ALL = [
    (family, name)
    for family in FAMILIES
    for name in METHODS | VARIANTS
    if not (family in WITHOUT_BIAS and name == "lora-bias")
]
every_case = pytest.mark.parametrize(("family", "method"), ALL)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))


def method_named(name: str) -> Method:
    """The method or variant of this name."""
    return (METHODS | VARIANTS)[name]


def adapted(
    family: str, method: str, dtype: torch.dtype = torch.float32, *names: str, **size: object
) -> PreTrainedModel:
    """A tiny model with one trained-looking adapter for each of `names` (default: "a")."""
    model = tiny(family, dtype, **size)
    for number, name in enumerate(names or ("a",)):
        lk.attach(model, method_named(method), name=name)
        scramble(model, name, seed=number)
    return model


@torch.no_grad()
def scramble(model: nn.Module, name: str, seed: int = 0, std: float = 0.05) -> None:
    """Move an adapter's numbers away from where they start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for value in adapter_tensors(model, name).values():
        value += std * torch.randn(value.shape, generator=generator)


def output(model: PreTrainedModel, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The model's first output on token ids (default: seeded ones)."""
    return model(tokens(model) if input_ids is None else input_ids)[0]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same keys and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two outputs agree to `tolerance` of the largest value."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
