"""Tiny models with random weights: every supported family, made in milliseconds, offline and seeded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
ENCODERS = ("bert", "roberta")
FAMILIES = DECODERS + ENCODERS

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2}
_ENCODER_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": _ENCODER_DROPOUT,
    "roberta": {**_ENCODER_DROPOUT, "max_position_embeddings": 66, "type_vocab_size": 1},
}


def tiny(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    tied: bool = False,
    labels: int | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A model of `family` with 2 layers of width 32, in eval mode, without dropout.

    Decoders get a language-model head (untied unless `tied`), encoders are bare; `labels=n` gives any family a
    classification head of n classes instead. `overrides` are fields of the family's config.
    """
    fields: dict[str, Any] = {**_SIZES, **_OF_FAMILY[family], "tie_word_embeddings": tied}
    if labels is not None:
        fields["num_labels"] = labels
    config = AutoConfig.for_model(family, **{**fields, **overrides})
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM if family in DECODERS else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config, dtype=dtype)
        _vary_vectors(model)
    return model.eval()


def tokens(model: PreTrainedModel, rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Seeded token ids (rows, length) for `model`; none of them is the padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def _vary_vectors(model: PreTrainedModel) -> None:
    """Move biases off 0 and norms off 1, so that a law about them can fail."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
