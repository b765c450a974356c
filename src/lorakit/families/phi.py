"""Phi 1, 1.5 and 2: attention and feed-forward part stand side by side, after one norm."""

from lorakit.core.sites import Family

FAMILY = Family(
    model_types=("phi",),
    block="layers.*",
    inside={
        "attn": "self_attn",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.dense",
        "mlp": "mlp",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
        "norm.attn": "input_layernorm",
    },
    outside={"embed": "embed_tokens", "head": "lm_head"},
)
