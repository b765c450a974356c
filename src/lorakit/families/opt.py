"""OPT: its feed-forward layers see all tokens of a batch as one list; the 350m model norms after each addition."""

from lorakit.core.sites import Family

_LIST = "it reads the tokens of all rows as one list"
FAMILY = Family(
    model_types=("opt",),
    block="layers.*",
    inside={
        "attn": "self_attn",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.out_proj",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
        "norm.attn": "self_attn_layer_norm",
        "norm.mlp": "final_layer_norm",
    },
    outside={"embed": "embed_tokens", "head": "lm_head"},
    unbatched={"fc1": _LIST, "fc2": _LIST, "layers.*.final_layer_norm": _LIST},
    given={("do_layer_norm_before", False): {"post_norm": True}},
)
