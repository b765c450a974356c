"""ViT: an encoder of image patches, by its names in newer and in older transformers."""

from lorakit.core.sites import Family

FAMILY = Family(
    model_types=("vit",),
    block=("layers.*", "encoder.layer.*"),
    inside={
        "attn": "attention",
        "attn.q": ("attention.q_proj", "attention.attention.query"),
        "attn.k": ("attention.k_proj", "attention.attention.key"),
        "attn.v": ("attention.v_proj", "attention.attention.value"),
        "attn.o": ("attention.o_proj", "attention.output.dense"),
        "mlp": "mlp",
        "mlp.up": ("mlp.fc1", "intermediate.dense"),
        "mlp.down": ("mlp.fc2", "output.dense"),
        "norm.attn": "layernorm_before",
        "norm.mlp": "layernorm_after",
    },
    outside={"embed": "patch_embeddings.projection", "head": "classifier"},
    bidirectional=True,
    leading=1,
)
