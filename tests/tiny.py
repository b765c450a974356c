"""Tiny models with random weights: every supported family, made in milliseconds, offline and seeded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gptj", "opt"),
    *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral", "qwen3_moe"),
)
ENCODERS = ("bert", "roberta", "deberta", "deberta-v2")
SEQUENCE_TO_SEQUENCE = ("t5",)
VISION = ("vit",)
FAMILIES = DECODERS + ENCODERS + SEQUENCE_TO_SEQUENCE + VISION
KIN = {  # model types that have the module names of one of these families, and its sizes here
    **dict.fromkeys(("ministral", "smollm3"), "llama"),
    **dict.fromkeys(("olmoe", "qwen2_moe"), "qwen3_moe"),
    **{"electra": "bert", "xlm-roberta": "roberta", "camembert": "roberta", "mt5": "t5", "umt5": "t5"},
}

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
_SIZED = {**_GROUPED, "head_dim": 8}
_ROUTED = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}  # the one that knows float64 and compiles
_EXPERTS = {**_ROUTED, "num_experts": 4, "moe_intermediate_size": 48}
_ENCODER_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DEBERTA = {
    **_ENCODER_DROPOUT,
    **{"type_vocab_size": 0, "position_biased_input": False},
    **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 4},
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "ministral": _SIZED,
    "qwen2": _GROUPED,
    "qwen3": _SIZED,
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "gptj": {"n_inner": 48, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gemma": _SIZED,
    "gemma2": {**_SIZED, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SIZED, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": _GROUPED,
    "mixtral": {**_GROUPED, **_ROUTED, "num_local_experts": 4},
    "qwen3_moe": {**_SIZED, **_EXPERTS},
    "olmoe": {**_GROUPED, **_EXPERTS},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "bert": _ENCODER_DROPOUT,
    "electra": {**_ENCODER_DROPOUT, "embedding_size": 32},
    "roberta": {**_ENCODER_DROPOUT, "max_position_embeddings": 66, "type_vocab_size": 1},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    "t5": {
        **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        **{"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0},
    },
    "vit": {**_ENCODER_DROPOUT, "image_size": 8, "patch_size": 4},
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
    """A model of `family` (or of its kin) with 2 layers of width 32, in eval mode, without dropout.

    Decoders get a language-model head (untied unless `tied`; T5's is always tied), encoders are bare; `labels=n` gives
    any family a classification head of n classes instead. `overrides` are fields of the family's config.
    """
    own = _OF_FAMILY[family if family in _OF_FAMILY else KIN[family]]
    fields: dict[str, Any] = {**_SIZES, **own, "tie_word_embeddings": tied}
    if labels is not None:
        fields["num_labels"] = labels
    config = AutoConfig.for_model(family, **{**fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _kind(KIN.get(family, family), labels).from_config(config, dtype=dtype)
        for parameter in model.parameters():  # DeBERTa makes some in float32 whatever is asked, and then cannot run
            parameter.data = parameter.data.to(dtype)
        _vary_vectors(model)
        _settle_routers(model)
    return model.eval()


def _kind(family: str, labels: int | None) -> Any:
    if labels is not None:
        return AutoModelForImageClassification if family in VISION else AutoModelForSequenceClassification
    if family in SEQUENCE_TO_SEQUENCE:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if family in DECODERS else AutoModel


def tokens(model: PreTrainedModel, rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Seeded token ids (rows, length) for `model`; none of them is the padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


def inputs(model: PreTrainedModel, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the model's forward needs, seeded: token ids (rows, length), the decoder's too, or images."""
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (rows, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)}
    given = {"input_ids": tokens(model, rows, length, seed)}
    return given | ({"decoder_input_ids": tokens(model, rows, length, seed + 1)} if config.is_encoder_decoder else {})


@torch.no_grad()
def _vary_vectors(model: PreTrainedModel) -> None:
    """Move biases off 0 and norms off 1, so that a law about them can fail."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@torch.no_grad()
def _settle_routers(model: PreTrainedModel) -> None:
    """Let a token's number decide between two pairs of experts: rounding would decide a close choice."""
    routers = [module for path, module in model.named_modules() if path.endswith("mlp.gate")]
    for router in routers:
        router.weight[:2, 0] += 8
        router.weight[2:, 0] -= 8
    if routers:
        embeddings = model.get_input_embeddings().weight
        embeddings[0::2, 0], embeddings[1::2, 0] = 3, -3
