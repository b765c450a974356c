"""GPT-2: transposed `Conv1D` layers; q, k and v are thirds of the fused `c_attn`."""

from lorakit.core.sites import Family, Part

FAMILY = Family(
    model_types=("gpt2",),
    block="h.*",
    inside={
        "attn": "attn",
        "attn.q": Part("attn.c_attn", 0, shares=(1, 1, 1)),
        "attn.k": Part("attn.c_attn", 1, shares=(1, 1, 1)),
        "attn.v": Part("attn.c_attn", 2, shares=(1, 1, 1)),
        "attn.qkv": "attn.c_attn",
        "attn.o": "attn.c_proj",
        "mlp": "mlp",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "norm.attn": "ln_1",
        "norm.mlp": "ln_2",
    },
    outside={"embed": "wte", "head": "lm_head"},
)
