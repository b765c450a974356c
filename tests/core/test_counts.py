"""LoRA's trainable parameters on the models of its paper, counted by `lk.summary`, are L · r · (in + out) a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

import lorakit as lk

DEBERTA = dict(
    vocab_size=128100,
    type_vocab_size=0,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
)
QV, ALL_FOUR = ("attn.q", "attn.v"), ("attn.q", "attn.k", "attn.v", "attn.o")
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "roberta-base": (RobertaModel, RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
    "roberta-large": (
        RobertaModel,
        RobertaConfig(
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            num_hidden_layers=24,
            hidden_size=1024,
            num_attention_heads=16,
            intermediate_size=4096,
        ),
    ),
    "gpt2-medium": (GPT2LMHeadModel, GPT2Config(n_layer=24, n_embd=1024, n_head=16)),
    "gpt2-large": (GPT2LMHeadModel, GPT2Config(n_layer=36, n_embd=1280, n_head=20)),
    "gpt3-175b": (GPT2LMHeadModel, GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)),
    "deberta-xxl": (
        DebertaV2Model,
        DebertaV2Config(
            **DEBERTA,
            conv_kernel_size=3,
            num_hidden_layers=48,
            hidden_size=1536,
            num_attention_heads=24,
            intermediate_size=6144,
        ),
    ),
}
BASES = {
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt3-175b": 174_604_259_328,
    "deberta-xxl": 1_565_336_064,
}
ROWS = [
    ("roberta-base", 8, QV, 294_912),
    ("roberta-large", 8, QV, 786_432),
    ("gpt2-medium", 4, QV, 393_216),
    ("gpt2-large", 4, QV, 737_280),
    ("gpt3-175b", 2, ("attn.v",), 4_718_592),
    ("gpt3-175b", 1, QV, 4_718_592),
    ("gpt3-175b", 2, QV, 9_437_184),
    ("gpt3-175b", 4, QV, 18_874_368),
    ("gpt3-175b", 8, QV, 37_748_736),
    ("gpt3-175b", 64, QV, 301_989_888),
    ("gpt3-175b", 1, ALL_FOUR, 9_437_184),
    ("gpt3-175b", 2, ALL_FOUR, 18_874_368),
    ("gpt3-175b", 4, ALL_FOUR, 37_748_736),
    ("gpt3-175b", 64, ALL_FOUR, 603_979_776),
    ("deberta-xxl", 16, QV, 4_718_592),
    ("deberta-xxl", 8, QV, 2_359_296),
    *(("gpt3-175b", 8, (role,), 18_874_368) for role in ALL_FOUR),
]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    with torch.device("meta"):
        return {name: kind(config) for name, (kind, config) in MODELS.items()}


@pytest.mark.parametrize(("name", "rank", "targets", "parameters"), ROWS)
def test_trained_parameters_are_those_of_the_formula(
    models: dict[str, PreTrainedModel], name: str, rank: int, targets: tuple[str, ...], parameters: int
) -> None:
    model = models[name]
    with torch.device("meta"):
        lk.attach(model, lk.LoRA(rank=rank, targets=targets))
    summary = lk.summary(model)
    lk.detach(model, "default")
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert parameters == 2 * layers * len(targets) * width * rank
    assert summary.trainable_parameters == parameters
    assert summary.base_parameters == BASES[name]
    assert summary.adapters[0].bytes_on_disk == 4 * stored(name, layers, width, rank, targets, parameters)


def stored(name: str, layers: int, width: int, rank: int, targets: tuple[str, ...], parameters: int) -> int:
    """Numbers in the file: slices of GPT-2's fused c_attn (3 d wide) are written as one block of their summed rank."""
    fused = [target for target in targets if target != "attn.o"] if name.startswith("gpt") else []
    return parameters - 2 * layers * len(fused) * width * rank + layers * len(fused) * rank * (width + 3 * width)


@pytest.mark.parametrize(("rank", "parameters"), [(8, 1_327_104), (2, 331_776)])
def test_all_six_matrices_of_deberta_are_those_beside_adalora(rank: int, parameters: int) -> None:
    """DeBERTaV3-base, as in AdaLoRA's tables: 12 (4 · 2 d r + 2 · 5 d r)."""
    with torch.device("meta"):
        model = DebertaV2Model(
            DebertaV2Config(
                **DEBERTA, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
            )
        )
        lk.attach(model, lk.LoRA(rank=rank, targets="linear"))
    assert lk.summary(model).trainable_parameters == parameters


def test_ranks_of_single_targets_are_counted_too(models: dict[str, PreTrainedModel]) -> None:
    model = models["gpt3-175b"]
    with torch.device("meta"):
        lk.attach(model, lk.LoRA(rank=1, targets=QV, ranks={"attn.v": 3}))
    assert lk.summary(model).trainable_parameters == 2 * 96 * 12288 * (1 + 3)
    lk.detach(model, "default")
