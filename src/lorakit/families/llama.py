"""Llama and the models that share its module names (Mistral, SmolLM)."""

from lorakit.core.sites import Family

FAMILY = Family(
    model_types=("llama", "mistral", "ministral", "smollm3"),
    block="layers.*",
    inside={
        "attn": "self_attn",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "mlp": "mlp",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "norm.attn": "input_layernorm",
        "norm.mlp": "post_attention_layernorm",
    },
    outside={"embed": "embed_tokens", "head": "lm_head"},
)
