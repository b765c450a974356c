"""How much a model computes and keeps for each token, by its sites and widths alone.

Legend of the formulas: N matrix numbers that a token passes, d width of the hidden states, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

from lorakit.core.delta import Delta
from lorakit.core.experts import Experts, experts_of
from lorakit.core.layouts import layout_of
from lorakit.core.plan import Plan
from lorakit.core.sites import Site, family_of, modules_of, sites_of

_NORM_BYTES = 4  # of a number that a norm keeps: float32, or little enough not to matter
_KEPT_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 2}  # numbers for each input, where it is not 1


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much is computed and kept."""

    blocks: tuple[str, ...]  # their paths
    body: float  # matrix numbers of the blocks that a token passes: of experts, those that it is sent to
    below: float  # those of them that lie before everything adapted, so that no gradient goes there
    head: int  # matrix numbers of a language model's head
    vocabulary: int
    hidden: int  # width of the hidden states
    widest: float  # numbers of one token inside a block, at most
    queries: int  # width of the queries, of all layers together
    bidirectional: bool


@dataclass(frozen=True)
class Flops:
    """Operations for each token: a multiplication and an addition are two."""

    forward: float
    step: float  # forward and backward
    recomputed: float  # what a step adds that computes the blocks again
    every_weight: float  # a step that trains every weight

    def times(self, factor: float) -> Flops:
        """All of them that many times."""
        return Flops(*(value * factor for value in astuple(self)))


def shape_of_model(model: Any, plan: Plan) -> Shape:
    """The shape of a model to which a plan is attached (or is going to be)."""
    sites, head = sites_of(model), model.get_output_embeddings()
    blocks = blocks_of(sites)
    matrices = [(path, *found) for path, module in modules_of(model) for found in _matrices(module, model.config)]
    inside = [entry for entry in matrices if not blocks or entry[0].startswith(tuple(f"{path}." for path in blocks))]
    below = _below(model, blocks, plan)
    return Shape(
        blocks=blocks,
        body=sum(numbers for _, numbers, _ in inside),
        below=sum(numbers for path, numbers, _ in inside if path.startswith(below)),
        head=0 if head is None else head.weight.numel(),
        vocabulary=0 if head is None else head.weight.shape[0],
        hidden=model.config.get_text_config().hidden_size,
        widest=max((wide for *_, wide in inside), default=0),
        queries=sum(site.out_features for site in sites if site.role == "attn.q"),
        bidirectional=family_of(model).bidirectional,
    )


def blocks_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The paths of the blocks among sites."""
    return tuple(dict.fromkeys(site.path for site in sites if site.role == "block"))


def _matrices(module: nn.Module, config: Any) -> Iterator[tuple[float, float]]:
    """Numbers that a token passes and the wider side, of each matrix that is a module's own."""
    layout = layout_of(module)
    if layout is not None and not layout.lookup:
        yield layout.in_features * layout.out_features, max(layout.in_features, layout.out_features)
    for experts in experts_of(module).values():
        chosen, inner, out = _chosen(config, experts), experts.in_features, experts.out_features
        yield chosen * inner * out, chosen * max(inner, out)


def _chosen(config: Any, experts: Experts) -> int:
    """How many of the experts a token is sent to."""
    return int(getattr(config.get_text_config(), "num_experts_per_tok", experts.count))


def _below(model: nn.Module, blocks: Iterable[str], plan: Plan) -> tuple[str, ...]:
    """The blocks that end before the first module that is adapted, as beginnings of their modules' paths."""
    order = {path: number for number, (path, _) in enumerate(modules_of(model))}
    first = min((placement.path for placement in plan), key=lambda path: order.get(path, -1))
    before = (block for block in blocks if order[block] < order.get(first, -1))
    return tuple(f"{block}." for block in before if not first.startswith(f"{block}."))


def flops(shape: Shape, deltas: Iterable[Delta], length: float, labelled: float, *, replaces: bool) -> Flops:
    """Operations of a token in sequences of S tokens of which the share f is labelled.

    Forward 2 (N + f N_head) + a with attention a = 2 S d_q (twice that where a token sees those after it). Backward
    costs the same for the gradients of what is passed on, 2.5 a for attention's, and 2 for each trained number.

    Args:
        shape: of the model.
        deltas: what is trained.
        length: S.
        labelled: f, the share of positions whose logits are computed.
        replaces: whether the deltas are the modules' weights, and not something beside them.
    """
    attention = (4 if shape.bidirectional else 2) * length * shape.queries
    passed = shape.body + labelled * shape.head
    added, trained = _numbers_of(deltas, replaces=replaces)
    backward = 2 * (passed + added - shape.below) + 2 * trained + 2.5 * attention * (1 - shape.below / shape.body)
    forward = 2 * (passed + added) + attention
    return Flops(forward, forward + backward, 2 * (shape.body + added) + attention, 6 * passed + 3.5 * attention)


def _numbers_of(deltas: Iterable[Delta], *, replaces: bool) -> tuple[float, float]:
    """Matrix numbers that deltas add to a token's way, and those of them (and of the base's) that are trained."""
    added = trained = 0
    for delta in deltas:
        instead = replaces or delta.placement.is_replaced
        for tensor in (*delta.parameters(), *delta.buffers()):
            numbers = tensor.numel() if tensor.dim() > 1 else 0
            added += 0 if instead else numbers
            trained += numbers if tensor.requires_grad else 0
    return added, trained


def kept_per_token(model: Any, plan: Plan) -> float:
    """Bytes that autograd keeps of a token, by formula: for models that cannot be probed.

    Each block keeps the inputs of its norms and of its activation function, queries, keys, values and attention's
    output, both factors of a gated product, the inputs of adapted layers (once for those that read the same), and what
    the deltas make in between (their ranks). Dropout masks are not counted.
    """
    sites, size = sites_of(model), model.dtype.itemsize
    found = 0.0
    for block in blocks_of(sites):
        inside = [site for site in sites if site.path.startswith(f"{block}.")]
        adapted = [placement for placement in plan if f"{placement.path}.".startswith(f"{block}.")]
        widths = _Widths(inside, model.config)
        numbers = widths.attention() + widths.feed_forward() + widths.read_by({each.path for each in adapted})
        found += size * (numbers + sum(placement.rank for placement in adapted))
        found += _NORM_BYTES * sum(_norm_width(module) for _, module in modules_of(model.get_submodule(block)))
    return found


_READERS: Mapping[str, str] = {  # a role -> one of those that read the same
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.qkv"), "attn.q"),
    **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.gate_up"), "mlp.up"),
    "mlp.down": "mlp.down",
}


@dataclass(frozen=True)
class _Widths:
    """The sites of one block, and what they keep of a token in numbers."""

    sites: Sequence[Site]
    config: Any

    def attention(self) -> float:
        """Queries, keys, values, and the output."""
        parts = [site for site in self.sites if site.role in ("attn.q", "attn.k", "attn.v")]
        return sum(site.out_features for site in parts) + self.inner("attn.o")

    def feed_forward(self) -> float:
        """What the activation function keeps, and both factors of a gated product."""
        text = self.config.get_text_config()
        name = next((getattr(text, key) for key in ("hidden_act", "activation_function") if hasattr(text, key)), "")
        kept = _KEPT_BY_ACTIVATION.get(str(name), 1)
        gated = any(site.role == "mlp.gate" for site in self.sites)
        return self.inner("mlp.down") * (kept + 2 if gated else kept)

    def read_by(self, adapted: set[str]) -> float:
        """The inputs of adapted layers that nothing else keeps (attention's output is kept anyway)."""
        roles = {site.role for site in self.sites if site.path in adapted}
        return sum(self.inner(role) for role in {_READERS[role] for role in roles if role in _READERS})

    def inner(self, role: str) -> float:
        """The input width of the first site of a role, of all experts that a token is sent to; 0 if there is none."""
        site = next((site for site in self.sites if site.role == role and site.has_matrix), None)
        if site is None:
            return 0
        if site.experts is not None:
            return site.experts.in_features * _chosen(self.config, site.experts)
        return 0 if site.layout is None else site.layout.in_features


def _norm_width(module: nn.Module) -> int:
    """Numbers of a norm's weight; 0 for what is none."""
    own = [value for value in module._parameters.values() if value is not None]
    return own[0].numel() if own and all(value.dim() == 1 for value in own) else 0
