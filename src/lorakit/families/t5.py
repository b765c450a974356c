"""T5 and its multilingual kin: encoder and decoder have blocks of the same name; the decoder's also read the encoder.

Roles name the layers of both, and of self- and cross-attention alike. `bidirectional` is the encoder's.
"""

from lorakit.core.sites import Family

FAMILY = Family(
    model_types=("t5", "mt5", "umt5"),
    block="block.*",
    inside={
        "attn": ("layer.0.SelfAttention", "layer.1.EncDecAttention"),
        "attn.q": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
        "attn.k": ("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
        "attn.v": ("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
        "attn.o": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
        "mlp": ("layer.1.DenseReluDense", "layer.2.DenseReluDense"),
        "mlp.gate": ("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
        "mlp.up": tuple(f"layer.{n}.DenseReluDense.{up}" for n in (1, 2) for up in ("wi", "wi_1")),
        "mlp.down": ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
        "norm.attn": "layer.0.layer_norm",
        "norm.mlp": "layer.2.layer_norm",
    },
    outside={
        "embed": "shared",
        "head": "lm_head",
        "norm.attn": "decoder.block.*.layer.1.layer_norm",
        "norm.mlp": "encoder.block.*.layer.1.layer_norm",
    },
    bidirectional=True,
    unbatched={"relative_attention_bias": "it reads distances between tokens, which all rows of a batch share"},
)
