"""A record for models of no known family, inferred from the names that their layers commonly have."""

from __future__ import annotations

import re

from torch import nn

from lorakit.core.layouts import layout_of
from lorakit.core.sites import Family, modules_of

LEAVES = {
    "attn.q": ("q_proj", "query", "q_lin", "q", "query_proj", "wq", "to_q"),
    "attn.k": ("k_proj", "key", "k_lin", "k", "key_proj", "wk", "to_k"),
    "attn.v": ("v_proj", "value", "v_lin", "v", "value_proj", "wv", "to_v"),
    "attn.o": ("o_proj", "out_proj", "out_lin", "o", "wo", "to_out"),
    "attn.qkv": ("qkv_proj", "c_attn", "query_key_value", "qkv", "Wqkv", "in_proj"),
    "mlp.gate": ("gate_proj", "wi_0", "w1"),
    "mlp.up": ("up_proj", "fc1", "fc_in", "c_fc", "lin1", "dense_h_to_4h", "wi", "wi_1", "w3"),
    "mlp.down": ("down_proj", "fc2", "fc_out", "lin2", "dense_4h_to_h", "w2"),
    "mlp.gate_up": ("gate_up_proj",),
}
_ROLE = {leaf: role for role, leaves in LEAVES.items() for leaf in leaves}
_BLOCK = re.compile(r"(?:.*?\.)?(\w+)\.\d+\.(.+)")


def infer(model: nn.Module) -> Family:
    """Give each role the one path below a numbered block whose last name is usual for it."""
    inside: dict[str, str] = {}
    blocks: dict[str, int] = {}
    for path, module in modules_of(model):
        below = _BLOCK.fullmatch(path)
        role = _ROLE.get(path.rsplit(".", 1)[-1])
        if below and role and layout_of(module):
            inside.setdefault(role, below.group(2))
            blocks[below.group(1)] = blocks.get(below.group(1), 0) + 1
    block = max(blocks, key=lambda name: blocks[name]) if blocks else "layers"
    return Family((), f"{block}.*", inside, _ends(model))


def _ends(model: nn.Module) -> dict[str, str]:
    ends = {"embed": "get_input_embeddings", "head": "get_output_embeddings"}
    paths = {id(module): path for path, module in modules_of(model)}
    found = {}
    for role, getter in ends.items():
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if id(module) in paths:
            found[role] = paths[id(module)]
    return found
