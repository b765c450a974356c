"""A record for models of no known family, inferred from the names that their layers commonly have.

Names alone do not tell where q, k and v lie in a fused layer, so a fused layer is `attn.qkv` or `mlp.gate_up` as a
whole. A role may have several paths below a block (self- and cross-attention): all of them are found. Stacked experts
are told by the names of their parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from lorakit.core.experts import Experts, experts_of
from lorakit.core.layouts import EmbeddingLayout, Layout, layout_of
from lorakit.core.sites import Family, modules_of

# The last names of a path (one or two of them) that tell a layer's role: in an attention module, and elsewhere.
IN_ATTENTION = {
    "attn.q": ("q_proj", "query", "q_lin", "q", "query_proj", "wq", "Wq", "to_q"),
    "attn.k": ("k_proj", "key", "k_lin", "k", "key_proj", "wk", "Wk", "to_k"),
    "attn.v": ("v_proj", "value", "v_lin", "v", "value_proj", "wv", "Wv", "to_v"),
    "attn.o": ("o_proj", "out_proj", "out_lin", "o", "wo", "Wo", "to_out", "dense", "c_proj", "proj"),
    "attn.qkv": ("qkv_proj", "c_attn", "query_key_value", "qkv", "Wqkv", "in_proj"),
}
ELSEWHERE = {
    "mlp.gate": ("gate_proj", "wi_0", "w1"),
    "mlp.up": (
        *("up_proj", "fc1", "fc_in", "c_fc", "lin1", "linear1", "dense_h_to_4h", "wi", "wi_1", "Wi", "w3", "ffn"),
        *("intermediate.dense", "intermediate_dense"),
    ),
    "mlp.down": (
        *("down_proj", "fc2", "fc_out", "c_proj", "lin2", "linear2", "dense_4h_to_h", "wo", "Wo", "w2", "ffn_output"),
        *("output.dense", "output_dense"),
    ),
    "mlp.gate_up": ("gate_up_proj",),
}
NORMS = {
    "norm.attn": (
        *("input_layernorm", "ln_1", "norm1", "norm_1", "layer_norm1", "layernorm_before", "self_attn_layer_norm"),
        *("sa_layer_norm", "encoder_attn_layer_norm", "attn_norm", "attention_norm"),
    ),
    "norm.mlp": (
        *("pre_feedforward_layernorm", "post_feedforward_layernorm", "ln_2", "norm2", "norm_2", "layer_norm2"),
        *("layernorm_after", "output_layer_norm", "full_layer_layer_norm", "mlp_norm", "ffn_norm", "final_layer_norm"),
        *("post_attention_layernorm", "output.LayerNorm"),
    ),
}
NORMS_IN_ATTENTION = {"norm.attn": ("LayerNorm",)}
_BLOCK = re.compile(r"(?:.*?\.)?(\w+)\.\d+\.(.+)")
Paths = dict[str, dict[str, None]]  # role -> its paths below a block, in order
Matrix = Layout | Experts | None  # what is known of the weight at a path


def infer(model: nn.Module) -> Family:
    """Find the numbered blocks, and below them the layers whose names are usual for a role."""
    stacks = _stacks(model)
    roles = {container: _roles(container, found) for container, found in stacks.items()}
    block = max(roles, key=lambda container: _modules_in(model, container, roles[container]), default="layers")
    ends = _ends(model)
    for container in roles.keys() - {block}:  # e.g. feed-forward layers apart from the attentions
        for role, tails in roles[container].items():
            ends.setdefault(role, {}).update({f"{container}.*.{tail}": None for tail in tails})
    both = _sees_both_ways(model)
    inside = _one_or_many(roles.get(block, {}))
    return Family((), f"{block}.*", inside, _one_or_many(ends), bidirectional=both, leading=int(both))


def _sees_both_ways(model: nn.Module) -> bool:
    """Whether the attentions say that none of them is causal, as those of encoders that begin with [CLS] do."""
    told = [vars(module)["is_causal"] for module in model.modules() if "is_causal" in vars(module)]
    return bool(told) and not any(told)


def _stacks(model: nn.Module) -> dict[str, dict[str, Matrix]]:
    """For each name under which there are numbered modules: the paths below them, each with what is known of one."""
    stacks: dict[str, dict[str, Matrix]] = {}
    for path, module in modules_of(model):
        below = _BLOCK.fullmatch(path)
        if below:
            found = stacks.setdefault(below.group(1), {})
            found.setdefault(below.group(2), layout_of(module))
            for name, experts in experts_of(module).items():
                found.setdefault(f"{below.group(2)}.{name}", experts)
    return stacks


def _modules_in(model: nn.Module, container: str, roles: Paths) -> int:
    found = (_BLOCK.fullmatch(path) for path, _ in modules_of(model))
    return sum(below.group(2) in _all(roles) for below in found if below and below.group(1) == container)


def _roles(container: str, found: Mapping[str, Matrix]) -> Paths:
    roles: Paths = {}
    for tail, matrix in found.items():
        role = _role(f"{container}.{tail}", matrix)
        if role:
            roles.setdefault(role, {})[tail] = None
    _tell_gates_apart(roles, found)
    if any("feedforward" in tail for tail in roles.get("norm.mlp", {})):  # then this one ends the attention
        after = [tail for tail in roles["norm.mlp"] if tail.endswith("post_attention_layernorm")]
        _move(roles, "norm.mlp", "norm.attn", after)
    return {**roles, **_holders(roles, found)}


def _role(path: str, matrix: Matrix) -> str | None:
    """The role that the last one or two names of a path tell.

    >>> linear = layout_of(nn.Linear(2, 2))
    >>> _role("h.attn.c_proj", linear), _role("h.mlp.c_proj", linear), _role("layers.mixer.out_proj", linear)
    ('attn.o', 'mlp.down', None)
    """
    parts = path.split(".")
    in_attention = any("att" in name.lower() for name in parts[:-1])
    if matrix is None:
        tables = NORMS_IN_ATTENTION if in_attention else NORMS
    elif isinstance(matrix, EmbeddingLayout):
        return None
    else:
        tables = IN_ATTENTION if in_attention else ELSEWHERE
    ends = (".".join(parts[-2:]), parts[-1])
    return next((role for end in ends for role, names in tables.items() if end in names), None)


def _tell_gates_apart(roles: Paths, found: Mapping[str, Matrix]) -> None:
    """w1 and w2 without w3 have no gate; an `up` twice as wide as what goes down again is gate and up in one."""
    if not roles.get("mlp.up"):
        _move(roles, "mlp.gate", "mlp.up", list(roles.get("mlp.gate", {})))
    inner = {matrix.in_features for tail in roles.get("mlp.down", {}) if (matrix := found[tail])}
    if not roles.get("mlp.gate"):
        ups = {tail: found[tail] for tail in roles.get("mlp.up", {})}
        wide = [tail for tail, matrix in ups.items() if matrix and matrix.out_features in {2 * size for size in inner}]
        _move(roles, "mlp.up", "mlp.gate_up", wide)


def _holders(roles: Paths, found: Mapping[str, Matrix]) -> Paths:
    """The modules that hold the attention's and the feed-forward layers, where they hold nothing else."""
    holders: Paths = {}
    for holder, last in (("attn", "attn.o"), ("mlp", "mlp.down")):
        held = _all({role: tails for role, tails in roles.items() if role.startswith(f"{holder}.")})
        others = _all(roles).keys() - held.keys() - roles.get(f"norm.{holder}", {}).keys()
        for tail in roles.get(last, {}):
            path = max((_common(tail, other) for other in held if other != tail), key=len, default="")
            if isinstance(found[tail], Experts) and path == tail.rpartition(".")[0]:  # without the router
                path = path.rpartition(".")[0]
            if path and not any(other.startswith(f"{path}.") for other in others):
                holders.setdefault(holder, {})[path] = None
    return {holder: _outermost(paths) for holder, paths in holders.items()}


def _outermost(paths: Iterable[str]) -> dict[str, None]:
    """The paths that lie in no other of them.

    >>> list(_outermost(["mlp.shared_expert", "mlp"]))
    ['mlp']
    """
    return {path: None for path in paths if not any(path.startswith(f"{other}.") for other in paths)}


def _move(roles: Paths, old: str, new: str, tails: Iterable[str]) -> None:
    for tail in tails:
        del roles[old][tail]
        roles.setdefault(new, {})[tail] = None


def _common(one: str, other: str) -> str:
    """The dotted names that two paths begin with.

    >>> _common("attention.self.query", "attention.output.dense")
    'attention'
    """
    shared = []
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def _all(roles: Paths) -> dict[str, None]:
    return {tail: None for tails in roles.values() for tail in tails}


def _one_or_many(roles: Paths) -> dict[str, str | tuple[str, ...]]:
    return {role: next(iter(tails)) if len(tails) == 1 else tuple(tails) for role, tails in roles.items() if tails}


def _ends(model: nn.Module) -> Paths:
    ends = {"embed": "get_input_embeddings", "head": "get_output_embeddings"}
    paths = {id(module): path for path, module in modules_of(model)}
    found: Paths = {}
    for role, getter in ends.items():
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if id(module) in paths:
            found[role] = {paths[id(_only_layer(module))]: None}
    return found


def _only_layer(module: nn.Module) -> nn.Module:
    """The one layer with a weight matrix that a module wraps (an image's patches), or the module itself."""
    layers = [inner for inner in module.modules() if layout_of(inner)]
    return layers[0] if len(layers) == 1 else module
