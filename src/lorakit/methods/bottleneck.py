"""Adapter layers: small bottleneck networks inside every block (Houlsby et al. 2019, arXiv:1902.00751, and kin)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self, cast

from torch import nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import LinearLayout, layout_of
from lorakit.core.method import Method, Rules
from lorakit.core.plan import MODULE, Placement, Plan
from lorakit.core.sites import ADAPTERS, Site, family_of, modules_of, sites_of
from lorakit.core.state import deltas_of
from lorakit.errors import BadMethod, nearest
from lorakit.methods._narrow import (
    Activation,
    AfterSite,
    AroundNorm,
    BottleneckParts,
    CommonParts,
    DenseProjection,
    NarrowDelta,
    Start,
    depth_of,
    kronecker,
    start_all,
)
from lorakit.methods._targeted import whole

Place = Literal["sublayers", "mlp", "residual", "block"]
AFTER, AROUND = "bottleneck", "bottleneck-around-norm"
ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "sublayers": ("attn.o", "mlp.down"),
    "mlp": ("mlp.down",),
    "residual": ("block",),
    "block": ("block",),
}
_PFEIFFER = {"size": 16, "place": "residual", "activation": "relu", "init": "normal"}
_COMPACTER = {"size": 24, "activation": "gelu", "kronecker": 4, "train_norms": True}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """y + W_up f(W_down y + b) + b', with W_down (r, d), W_up (d, r) and f a non-linearity.

    The papers differ in where y is taken and in what the two matrices are; each is a named constructor: `houlsby`
    (Adapter-H), `lin` (Adapter-L), `pfeiffer` (Adapter-P), `dropped` (Adapter-D), `compacter` and `compacter_plus`.
    Each takes the fields below, which win over the paper's.

    Example:
        >>> Bottleneck.houlsby(size=8).place, Bottleneck.pfeiffer(size=64).activation
        ('sublayers', 'relu')

    Papers: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751; Lin, Madotto and Fung 2020,
    https://arxiv.org/abs/2004.03829; Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247; AdapterDrop: Rücklé et al.
    2020, https://arxiv.org/abs/2010.11918; Compacter: Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647.
    """

    name: ClassVar[str] = "bottleneck"
    kinds: ClassVar[tuple[str, ...]] = (AFTER, AROUND)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "houlsby": {},
        "lin": {"place": "block", "activation": "relu", "init": "normal", "own_norm": True},
        "pfeiffer": _PFEIFFER,
        "dropped": _PFEIFFER | {"drop": 1},
        "compacter": _COMPACTER,
        "compacter-plus": _COMPACTER | {"place": "mlp"},
    }
    waives: ClassVar[Mapping[str, str]] = {
        "fresh": "the papers start near the identity, not at it",
        "merge": "a non-linear function is no change of weights",
    }

    size: int = 8  # r; the width of the bottleneck
    place: Place = "sublayers"  # after attention and MLP; or after the mlp, at the residual sum, at the block's end
    activation: Activation = "silu"  # relu, gelu or silu
    init: Start = "truncated"  # N(0, 0.01²) cut at two deviations (Houlsby's), or normal: N(0, 0.02²)
    kronecker: int = 0  # n: both matrices are sums of n Kronecker products (Compacter); 0: they are dense
    own_norm: bool = False  # a new LayerNorm before the bottleneck, trained with it
    train_norms: bool = False  # train the model's norms, too
    drop: int = 0  # how many of the lowest blocks do without an adapter
    drop_most: int = 0  # leave out a random number of the lowest blocks, up to this, anew in every training step
    seed: int = 0  # of these random numbers

    def _rules(self) -> Rules:
        yield from (whole(name, getattr(self, name), 0) for name in ("kronecker", "drop", "drop_most", "seed"))
        yield whole("size", self.size)
        if self.kronecker > 0:
            yield "size", self.size, f"a multiple of kronecker={self.kronecker}", self.size % self.kronecker == 0

    @classmethod
    def houlsby(cls, **fields: Any) -> Self:
        """Adapter-H: after attention and after the MLP, each before the residual addition."""
        return cls._preset("houlsby", fields)

    @classmethod
    def lin(cls, **fields: Any) -> Self:
        """Adapter-L: at the end of each block, behind a LayerNorm of its own."""
        return cls._preset("lin", fields)

    @classmethod
    def pfeiffer(cls, **fields: Any) -> Self:
        """Adapter-P: at the residual sum after the MLP; where a norm follows, that norm is used twice."""
        return cls._preset("pfeiffer", fields)

    @classmethod
    def dropped(cls, **fields: Any) -> Self:
        """Adapter-D, AdapterDrop: Pfeiffer's adapters without the lowest `drop` blocks."""
        return cls._preset("dropped", fields)

    @classmethod
    def compacter(cls, **fields: Any) -> Self:
        """Compacter: Houlsby's places, matrices that are Kronecker sums with shared left factors, norms trained."""
        return cls._preset("compacter", fields)

    @classmethod
    def compacter_plus(cls, **fields: Any) -> Self:
        """Compacter++: Compacter after the MLP only."""
        return cls._preset("compacter-plus", fields)

    @classmethod
    def _preset(cls, name: str, fields: Mapping[str, Any]) -> Self:
        return cls(**{**cls.presets[name], **fields})

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """The adapters in model order, without those of dropped blocks, then the norms."""
        around = self.place == "residual" and family_of(model).post_norm
        if around and self.train_norms:
            raise BadMethod(f"{type(model).__name__} ends its blocks with a norm that these adapters use as it is, so "
                            "train_norms is not possible; take another place or train_norms=False")  # fmt: skip
        sites = _sites(model, ("norm.mlp",) if around else ROLES[self.place])
        self._refuse_all_dropped(1 + max(depth_of(site.path) for site in sites))
        first = 0 if self.drop_most else self.drop
        kept = [site for site in sites if depth_of(site.path) >= first]
        own = [Placement(site.path, site.role, AROUND if around else AFTER, rank=self.size) for site in kept]
        return (*own, *(_norms(model) if self.train_norms else ()))

    def _refuse_all_dropped(self, blocks: int) -> None:
        for name, number in (("drop", self.drop), ("drop_most", self.drop_most)):
            if number >= blocks:
                raise BadMethod(f"{name}={number} leaves no adapter: the model has {blocks} blocks; "
                                f"take {blocks - 1} at most")  # fmt: skip

    def shared(self, plan: Plan, model: nn.Module) -> CommonParts:
        """The width of every place, and A of the Kronecker sums."""
        inside = [site for site in sites_of(model) if site.layout and site.role in ROLES["sublayers"]]
        own = {placement.path: placement for placement in plan if placement.kind in self.kinds}
        return CommonParts({path: _width(each, model, inside) for path, each in own.items()}, self.kronecker)

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> NarrowDelta:
        """Room for the two projections, and for a norm."""
        common, size = cast(CommonParts, shared), placement.rank
        width = common.widths[placement.path]
        down: nn.Module
        up: nn.Module
        if common.factors is None:
            down, up = DenseProjection(width, size, self.init), DenseProjection(size, width, self.init)
        else:
            down, up = kronecker(width, size, common.factors, placement.path)
        parts = BottleneckParts(down, up, nn.LayerNorm(width) if self.own_norm else None, self.activation)
        kind = AroundNorm if placement.kind == AROUND else AfterSite
        return kind(placement, module, parts, drop=self.drop, drop_most=self.drop_most)

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """Near the identity."""
        start_all(deltas)

    def before_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Draw how many of the lowest blocks do without their adapter in this step: the same again on a resume."""
        if self.drop_most:
            left_out = random.Random(f"{self.seed} {step}").randint(0, self.drop_most)
            for delta in _narrow(deltas):
                delta.rests_in_training = delta.depth < left_out

    def after_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Between steps every adapter is in use."""
        self.rest(deltas)

    def rest(self, deltas: Sequence[Delta]) -> None:
        """Every adapter is in use."""
        for delta in _narrow(deltas):
            delta.rests_in_training = False

    @staticmethod
    def leave_out(model: nn.Module, name: str, blocks: int) -> None:
        """From now on, inference does without an attached adapter's layers in the lowest `blocks` blocks.

        It is a state of the model object, not saved with the adapter. 0 brings all of them back.

        Raises:
            NoSuchAdapter: no adapter of that name.
            BadMethod: the adapter has no bottlenecks, or all of them would be left out.
        """
        deltas = list(_narrow(deltas_of(model, name)))
        if not deltas:
            raise BadMethod(f"{name!r} has no bottlenecks that could be left out")
        deepest = max(delta.depth for delta in deltas)
        if not 0 <= blocks <= deepest:
            raise BadMethod(f"leave_out takes 0 to {deepest} blocks for {name!r}, not {blocks}; for the base, "
                            "use(model, None)")  # fmt: skip
        for delta in deltas:
            delta.rests_in_inference = delta.depth < blocks


def _narrow(deltas: Sequence[Delta]) -> Iterator[NarrowDelta]:
    return (delta for delta in deltas if isinstance(delta, NarrowDelta))


def _sites(model: nn.Module, roles: Sequence[str]) -> list[Site]:
    """The sites of these roles in model order; of several attentions in a block, the first (the self-attention).

    Raises:
        BadMethod: the model has no site of a role.
    """
    sites, kind = sites_of(model), type(model).__name__
    have = {site.role for site in sites}
    for role in roles:
        if role not in have:
            raise BadMethod(f"these adapters act at {role}, which {kind} has not; take another place; "
                            f"{nearest(role, have)}")  # fmt: skip
    blocks = {site.path for site in sites if site.role == "block"}
    found: dict[tuple[str, str], Site] = {}
    for site in sites:
        if site.role in roles:
            found.setdefault((_block_of(site.path, blocks) if site.role == "attn.o" else site.path, site.role), site)
    return list(found.values())


def _block_of(path: str, blocks: set[str]) -> str:
    """The block that a path lies in, or the path itself."""
    names = path.split(".")
    above = (".".join(names[:end]) for end in range(len(names), 0, -1))
    return next((each for each in above if each in blocks), path)


def _width(placement: Placement, model: nn.Module, inside: Sequence[Site]) -> int:
    """How wide the hidden states at a placement are: a layer's output, a norm's, or that of a block's last layers.

    Raises:
        BadMethod: the module does not tell.
    """
    path, module = placement.path, model.get_submodule(placement.path)
    layout, weight = layout_of(module), module._parameters.get("weight")
    if placement.kind == AFTER and isinstance(layout, LinearLayout):
        return layout.out_features
    if placement.kind == AROUND and layout is None and weight is not None and weight.dim() == 1:
        return len(weight)
    below = [site.out_features for site in inside if layout is None and site.path.startswith(f"{path}.")]
    if placement.kind == AROUND or not below:
        raise BadMethod(f"{path}, a {type(module).__name__}, cannot hold a {placement.kind}: it is no linear layer or "
                        "norm, and no block whose width is known")  # fmt: skip
    return below[-1]


def _norms(model: nn.Module) -> list[Placement]:
    """Every norm of the model, to be trained whole.

    Raises:
        BadMethod: there is none.
    """
    paths = [path for path, module in modules_of(model) if _is_norm(module)]
    if not paths:
        raise BadMethod(f"{type(model).__name__} has no norms to train; set train_norms=False")
    return [Placement(path, "module", MODULE) for path in paths]


def _is_norm(module: nn.Module) -> bool:
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    vectors = bool(own) and all(parameter.dim() == 1 for parameter in own)
    return vectors and set(module._modules) <= {ADAPTERS} and "norm" in type(module).__name__.lower()
