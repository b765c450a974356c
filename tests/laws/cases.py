"""What every law runs on: each method in `methods/`, some variants of them, each family, float32 and bf16.

The default suite runs every method on two families, LoRA's variants on four, others' on one and LoRA on all; the rest
is marked slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core.method import Method, method_names
from lorakit.core.state import adapter_tensors, deltas_of
from tests.tiny import FAMILIES, inputs, tiny

DTYPES = (torch.float32, torch.bfloat16)
COMMON = ("gpt2", "bert")  # the default suite runs every method on these families
CORE = ("llama", "gpt2", "bert", "roberta")  # ... LoRA's variants on these, and LoRA itself on all
METHODS: dict[str, Method] = {name: kind.of_fields(dict(preset)) for name, (kind, preset) in method_names().items()}
VARIANTS: dict[str, Method] = {
    "lora-linear": lk.LoRA(rank=4, targets="linear", init="gaussian", scaling="alpha/sqrt(r)"),
    "lora-ranks": lk.LoRA(rank=4, targets="attention", ranks={"attn.v": 2, "attn.o": 6}, alphas={"attn.q": 4.0}),
    "lora-embed": lk.LoRA(rank=4, targets="embed,attn.q"),
    "lora-bias": lk.LoRA(rank=4, targets="mlp.up,attn.o", bias="all"),
    "lora-norm": lk.LoRA(rank=4, targets="mlp.up", train="norm.mlp"),
    "lora-pissa": lk.LoRA(rank=4, init="pissa"),
    "lora-orthogonal": lk.LoRA(rank=4, init="orthogonal"),
    "dylora-frozen": lk.DyLoRA(rank=4, frozen=True),
    "lokr-both": lk.LoKr(rank=2, decompose_both=True),
    "prefix-key-value": lk.PrefixLayer(prefix=3, form="key-value"),
    "bottleneck-norms": lk.Bottleneck(size=4, train_norms=True),
    "dropped-most": lk.Bottleneck.dropped(size=4, drop=0, drop_most=1),
}
WITHOUT_BIAS = (
    *("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "t5"),
)
STACKED = ("mixtral", "qwen3_moe")  # their feed-forward layers are experts, stacked into parameters
BESIDE_MLP = ("bottleneck", "houlsby", "compacter", "compacter-plus")  # they act on the feed-forward layer's output
CANNOT = {  # what a family cannot hold; test_refusals says that it is refused
    **{(family, name): "no bias" for family in WITHOUT_BIAS for name in ("bitfit", "lora-bias")},
    **{(family, "ia3"): "stacked experts" for family in STACKED},
    **{(family, name): "no linear layer or norm" for family in STACKED for name in BESIDE_MLP},
    **{("vit", name): "token ids" for name in ("prefix-embedding", "prefix-layer", "combine", "lora-prefix-layer")},
}


def _is_default(family: str, name: str) -> bool:
    families = COMMON if name in METHODS else CORE if name.startswith("lora-") else COMMON[:1]
    return name == "lora" or family in families


def _cases(*, are_long: bool = False) -> list[Any]:
    pairs = [(family, name) for family in FAMILIES for name in METHODS | VARIANTS if (family, name) not in CANNOT]
    pairs = [(family, name) for family, name in pairs if name in METHODS or family in CORE]
    default = [pair for pair in pairs if _is_default(*pair) and not (are_long and pair[1] in VARIANTS)]
    return [pytest.param(*pair, marks=() if pair in default else pytest.mark.slow) for pair in pairs]


every_case = pytest.mark.parametrize(("family", "method"), _cases())
every_long_case = pytest.mark.parametrize(("family", "method"), _cases(are_long=True))  # variants are slow, too
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))


def method_named(name: str) -> Method:
    """The method or variant of this name."""
    return (METHODS | VARIANTS)[name]


def waived(method: str, law: str) -> bool:
    """Whether a method is free of a law; the law's test then asserts the refusal."""
    return law in method_named(method).waives


def mixes(model: nn.Module, name: str = "a") -> bool:
    """Whether an adapter may be part of a weighted mixture."""
    return all(delta.mixes for delta in deltas_of(model, name))


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


def output(model: PreTrainedModel, given: torch.Tensor | Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The model's first output on token ids or other inputs (default: seeded ones)."""
    if isinstance(given, torch.Tensor):
        given = {"input_ids": given}
    return model(**(inputs(model) if given is None else given))[0]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same keys and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two outputs agree to `tolerance` of the largest value."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
