"""GPT-J: attention and feed-forward part stand side by side, after one norm."""

from lorakit.core.sites import Family

FAMILY = Family(
    model_types=("gptj",),
    block="h.*",
    inside={
        "attn": "attn",
        "attn.q": "attn.q_proj",
        "attn.k": "attn.k_proj",
        "attn.v": "attn.v_proj",
        "attn.o": "attn.out_proj",
        "mlp": "mlp",
        "mlp.up": "mlp.fc_in",
        "mlp.down": "mlp.fc_out",
        "norm.attn": "ln_1",
    },
    outside={"embed": "wte", "head": "lm_head"},
)
