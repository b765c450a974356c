"""Mixtures of experts with Llama's attention: Mixtral, OLMoE, Qwen 2 and 3 with experts.

The experts lie stacked in two parameters of `mlp.experts`, gate and up in one. Qwen 2's have a shared expert beside
them; layers without experts have Llama's feed-forward part. Router and experts see the tokens of a batch as one list.
"""

from dataclasses import replace

from lorakit.core import registry
from lorakit.core.sites import Part

_LLAMA = registry.find("lorakit.families", "llama").FAMILY
_GATE_UP, _LIST = "mlp.experts.gate_up_proj", "it reads the tokens of all rows as one list"
FAMILY = replace(
    _LLAMA,
    model_types=("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    inside={
        **_LLAMA.inside,
        "mlp.gate": ("mlp.gate_proj", "mlp.shared_expert.gate_proj", Part(_GATE_UP, 0, shares=(1, 1))),
        "mlp.up": ("mlp.up_proj", "mlp.shared_expert.up_proj", Part(_GATE_UP, 1, shares=(1, 1))),
        "mlp.gate_up": _GATE_UP,
        "mlp.down": ("mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.experts.down_proj"),
    },
    unbatched={"mlp.gate": _LIST, "mlp.experts": _LIST, "mlp.shared_expert*": _LIST},
)
