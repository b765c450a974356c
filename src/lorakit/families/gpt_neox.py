"""GPT-NeoX and Pythia: q, k and v are interleaved by head in the fused `query_key_value`."""

from lorakit.core.sites import Family, Part

_FUSED = "attention.query_key_value"
FAMILY = Family(
    model_types=("gpt_neox",),
    block="layers.*",
    inside={
        "attn": "attention",
        "attn.q": Part(_FUSED, 0, shares=(1, 1, 1), times="num_attention_heads"),
        "attn.k": Part(_FUSED, 1, shares=(1, 1, 1), times="num_attention_heads"),
        "attn.v": Part(_FUSED, 2, shares=(1, 1, 1), times="num_attention_heads"),
        "attn.qkv": _FUSED,
        "attn.o": "attention.dense",
        "mlp": "mlp",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        "norm.attn": "input_layernorm",
        "norm.mlp": "post_attention_layernorm",
    },
    outside={"embed": "embed_in", "head": ("lm_head", "embed_out")},  # embed_out: in older transformers
)
