"""Phi 3 and 4: q, k and v are unequal stretches of the fused `qkv_proj`, gate and up the halves of `gate_up_proj`."""

from lorakit.core.sites import Family, Part

_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
FAMILY = Family(
    model_types=("phi3",),
    block="layers.*",
    inside={
        "attn": "self_attn",
        "attn.q": Part(_QKV, 0, shares=_HEADS),
        "attn.k": Part(_QKV, 1, shares=_HEADS),
        "attn.v": Part(_QKV, 2, shares=_HEADS),
        "attn.qkv": _QKV,
        "attn.o": "self_attn.o_proj",
        "mlp": "mlp",
        "mlp.gate": Part(_GATE_UP, 0, shares=(1, 1)),
        "mlp.up": Part(_GATE_UP, 1, shares=(1, 1)),
        "mlp.gate_up": _GATE_UP,
        "mlp.down": "mlp.down_proj",
        "norm.attn": "input_layernorm",
        "norm.mlp": "post_attention_layernorm",
    },
    outside={"embed": "embed_tokens", "head": "lm_head"},
)
