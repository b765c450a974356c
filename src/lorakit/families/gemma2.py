"""Gemma 2 and the text part of Gemma 3: Gemma's module names, with a norm before and one after each half of a block."""

from dataclasses import replace

from lorakit.core import registry

_GEMMA = registry.find("lorakit.families", "gemma").FAMILY
FAMILY = replace(
    _GEMMA,
    model_types=("gemma2", "gemma3_text"),
    inside={
        **_GEMMA.inside,
        "norm.attn": ("input_layernorm", "post_attention_layernorm"),
        "norm.mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
)
