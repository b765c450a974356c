"""DeBERTa (first version): BERT's blocks, with q, k and v interleaved by head in the fused `in_proj`.

What projects the relative positions (`pos_proj`, `pos_q_proj`) has no role; a glob names it.
"""

from dataclasses import replace

from lorakit.core import registry
from lorakit.core.sites import Part

_BERT = registry.find("lorakit.families", "bert").FAMILY
_FUSED = "attention.self.in_proj"
_POSITIONS = "it projects the relative positions, which all rows of a batch share"
FAMILY = replace(
    _BERT,
    model_types=("deberta",),
    inside={
        **_BERT.inside,
        "attn.q": Part(_FUSED, 0, shares=(1, 1, 1), times="num_attention_heads"),
        "attn.k": Part(_FUSED, 1, shares=(1, 1, 1), times="num_attention_heads"),
        "attn.v": Part(_FUSED, 2, shares=(1, 1, 1), times="num_attention_heads"),
        "attn.qkv": _FUSED,
    },
    unbatched={"pos_proj": _POSITIONS, "pos_q_proj": _POSITIONS},
    given={},
)
