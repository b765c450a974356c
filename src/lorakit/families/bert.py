"""BERT and encoders with its module names; the head is the classifier, where there is one."""

from lorakit.core.sites import Family

FAMILY = Family(
    model_types=("bert", "electra"),
    block="layer.*",
    inside={
        "attn": "attention",
        "attn.q": "attention.self.query",
        "attn.k": "attention.self.key",
        "attn.v": "attention.self.value",
        "attn.o": "attention.output.dense",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "norm.attn": "attention.output.LayerNorm",
        "norm.mlp": "output.LayerNorm",
    },
    outside={"embed": "embeddings.word_embeddings", "head": "classifier"},
    post_norm=True,
    bidirectional=True,
    leading=1,
    given={("is_decoder", True): {"bidirectional": False}},
)
