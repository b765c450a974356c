"""DeBERTa v2 and v3: BERT's blocks; with `share_att_key`, q and k project the relative positions too.

Without it, what projects them (`pos_key_proj`, `pos_query_proj`) has no role; a glob names it.
"""

from dataclasses import replace

from lorakit.core import registry

_BERT = registry.find("lorakit.families", "bert").FAMILY
_POSITIONS = "it projects the relative positions, which all rows of a batch share"
_ALWAYS = {
    "encoder.LayerNorm": "it norms the relative positions, which all rows of a batch share",
    "pos_key_proj": _POSITIONS,
    "pos_query_proj": _POSITIONS,
}
FAMILY = replace(
    _BERT,
    model_types=("deberta-v2",),
    inside={
        **_BERT.inside,
        "attn.q": "attention.self.query_proj",
        "attn.k": "attention.self.key_proj",
        "attn.v": "attention.self.value_proj",
    },
    unbatched=_ALWAYS,
    given={("share_att_key", True): {"unbatched": {**_ALWAYS, "query_proj": _POSITIONS, "key_proj": _POSITIONS}}},
)
