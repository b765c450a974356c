"""Where a model can be adapted: sites, their roles, and the targets a user names.

A *role* is the product's word for a place (`attn.q`, `mlp.down`, `embed`), the same in every model family. A family is
one small record that says under which module names the roles live; `families/infer.py` guesses it for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lorakit.core import registry
from lorakit.core.experts import WEIGHT, Experts, experts_of
from lorakit.core.layouts import Layout, kind_of, layout_of
from lorakit.core.quantised import floats_of
from lorakit.errors import BadMethod, NoSuchTarget, nearest

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
GROUPS: Mapping[str, tuple[str, ...]] = {"attention": ATTENTION, "mlp": MLP, "linear": ATTENTION + MLP}
FUSED: Mapping[str, tuple[str, ...]] = {"attn.qkv": ATTENTION[:3], "mlp.gate_up": MLP[:2]}
ADAPTERS = "adapters"  # the child module that holds a layer's adapters


@dataclass(frozen=True)
class Slice:
    """Some of a layer's output units: `size` from `start` in each of `count` stretches of `stride` units.

    GPT-2's c_attn (3d units) holds q as Slice(0, d, 3d, 1); a layer that interleaves q, k, v by head has count = heads.
    """

    start: int
    size: int
    stride: int
    count: int = 1

    @property
    def width(self) -> int:
        return self.size * self.count

    def take(self, whole: Tensor, dim: int = -1) -> Tensor:
        """The slice's units along `dim`.

        >>> import torch
        >>> Slice(start=2, size=2, stride=6).take(torch.arange(6)).tolist()
        [2, 3]
        """
        parts = whole.unflatten(dim, (self.count, self.stride))
        return parts.narrow(_inner(dim), self.start, self.size).flatten(*_both(dim))

    def put(self, whole: Tensor, part: Tensor, dim: int = -1) -> Tensor:
        """A copy of `whole` with the slice's units replaced by `part`."""
        parts = whole.unflatten(dim, (self.count, self.stride))
        new = part.unflatten(dim, (self.count, self.size))
        inner = _inner(dim)
        return parts.slice_scatter(new, inner, self.start, self.start + self.size).flatten(*_both(dim))


def _inner(dim: int) -> int:
    return dim if dim < 0 else dim + 1


def _both(dim: int) -> tuple[int, int]:
    return (dim - 1, dim) if dim < 0 else (dim, dim + 1)


@dataclass(frozen=True)
class Site:
    """One place of a model: a module, or a slice of its output units, with its role.

    `layout` is None for modules that have no weight matrix of a known kind (norms, whole blocks). Stacked experts are a
    `parameter` of their module; they have `experts` instead of a layout, and slices of each expert's output units.
    """

    path: str
    role: str
    slice: Slice | None = None
    layout: Layout | None = field(default=None, compare=False)
    parameter: str = WEIGHT
    experts: Experts | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, str, Slice | None]:
        """What tells the site from others."""
        return self.path, self.parameter, self.slice

    @property
    def has_matrix(self) -> bool:
        """Whether there is a weight matrix, or one for each expert."""
        return self.layout is not None or self.experts is not None

    @property
    def out_features(self) -> int:
        """Output units of the site: those of the slice, or of the whole layer."""
        matrix = self.layout or self.experts
        if matrix is None:
            raise ValueError(f"{self.path} has no weight matrix")
        return self.slice.width if self.slice else matrix.out_features


@dataclass(frozen=True)
class Part:
    """One of the stretches of a fused layer's output, in which several roles lie side by side.

    `shares` are the relative widths of all stretches, `index` tells which of them is meant, and `times` how often the
    stretches come in turn (once a head, where q, k and v are interleaved): numbers, or names of the config's fields.

    >>> Part("attn.c_attn", 1, shares=(1, 1, 1)).index  # the second third
    1
    """

    path: str
    index: int
    shares: tuple[int | str, ...]
    times: int | str = 1


Where = str | Part | tuple[str | Part, ...]  # a path, a part of a fused layer, or several of these


@dataclass(frozen=True)
class Family:
    """Where the roles live in one model family.

    `block` is the tail of a block's path (`layers.*`); `inside` maps roles to paths below a block, `outside` to tails
    of whole paths; a role may have several (self- and cross-attention). The path of stacked experts ends in the name of
    their parameter.
    `post_norm` says that a block's norms come after the residual additions (BERT), `bidirectional` that a token sees
    those after it, and `leading` how many tokens have to stay first ([CLS]).
    `unbatched` maps tails of paths to the reason why the rows of a batch cannot be told apart in these layers.
    `given` holds the fields of this record that differ where a field of the config has some value.
    """

    model_types: tuple[str, ...]
    block: str | tuple[str, ...]
    inside: Mapping[str, Where]
    outside: Mapping[str, str | tuple[str, ...]]
    post_norm: bool = False
    bidirectional: bool = False
    leading: int = 0
    unbatched: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[tuple[str, object], Mapping[str, Any]] = field(default_factory=dict)


def family_of(model: nn.Module) -> Family:
    """The record of the model's family, or one inferred from its module names."""
    known = _known(getattr(model, "config", None))
    return registry.find("lorakit.families", "infer").infer(model) if known is None else known


def _known(config: Any) -> Family | None:
    for name in registry.names("lorakit.families"):
        module = registry.find("lorakit.families", name)
        if name != "infer" and getattr(config, "model_type", None) in module.FAMILY.model_types:
            return _as_given(module.FAMILY, config)
    return None


def _as_given(family: Family, config: Any) -> Family:
    for (name, value), fields in family.given.items():
        if getattr(config, name, None) == value:
            family = replace(family, **fields)
    return family


def unbatched(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Those of the layers in which the rows of a batch cannot be told apart, each with the reason."""
    family = _known(getattr(model, "config", None))
    told = family.unbatched if family else {}
    return {path: why for path in paths for tail, why in told.items() if is_tail(path, tail)}


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules, without those that adapters added."""
    for path, module in model.named_modules():
        if path and ADAPTERS not in path.split("."):
            yield path, module


def sites_of(model: nn.Module) -> list[Site]:
    """Every site of the model that has a role, in the order of its modules.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
        >>> [site.role for site in sites_of(model) if site.path == "h.0.attn.c_attn"]
        ['attn.q', 'attn.k', 'attn.v', 'attn.qkv']
    """
    family = family_of(model)
    block = _block(family)
    found = []
    for path, module in modules_of(model):
        layout = layout_of(module)
        for role, where in _roles(path, family, block):
            found.append(Site(path, role, _slice(where, layout, path, model), layout))
        for name, experts in experts_of(module).items():
            for role, where in _roles(f"{path}.{name}", family, block):
                part = _slice(where, experts, f"{path}.{name}", model)
                found.append(Site(path, role, part, None, name, experts))
    return found


def _block(family: Family) -> re.Pattern[str]:
    tails = "|".join(re.escape(tail).replace(re.escape("*"), "[0-9]+") for tail in _paths(family.block))
    return re.compile(rf"(?:.*\.)?(?:{tails})")


def _roles(path: str, family: Family, block: re.Pattern[str]) -> Iterator[tuple[str, str | Part]]:
    inside = block.match(path)
    if inside and inside.end() == len(path):
        yield "block", path
    if inside and path[inside.end() :].startswith("."):
        tail = path[inside.end() + 1 :]
        every = ((role, place) for role, where in family.inside.items() for place in _places(where))
        yield from ((role, place) for role, place in every if _path(place) == tail)
    for role, tails in family.outside.items():
        if any(is_tail(path, tail) for tail in _paths(tails)):
            yield role, path


def _places(where: Where) -> tuple[str | Part, ...]:
    return where if isinstance(where, tuple) else (where,)


def _path(place: str | Part) -> str:
    return place.path if isinstance(place, Part) else place


def _paths(where: Where) -> tuple[str, ...]:
    return tuple(_path(place) for place in _places(where))


def _slice(where: str | Part, layout: Layout | Experts | None, path: str, model: nn.Module) -> Slice | None:
    if layout is None or isinstance(where, str):
        return None
    shares, times = [_number(share, model) for share in where.shares], _number(where.times, model)
    unit, rest = divmod(layout.out_features, sum(shares) * times)
    if rest:
        raise BadMethod(
            f"{path} has {layout.out_features} output units, which its config does not share out: {times} times "
            f"{'+'.join(map(str, shares))} (from {', '.join(map(str, where.shares))}); the config is not this model's"
        )
    return Slice(unit * sum(shares[: where.index]), unit * shares[where.index], unit * sum(shares), times)


def _number(told: int | str, model: nn.Module) -> int:
    return told if isinstance(told, int) else int(getattr(model.config, told))


def is_tail(path: str, tail: str) -> bool:
    """Whether `path` ends with the dotted names of `tail` (which may hold wildcards).

    >>> is_tail("model.layers.0.self_attn.q_proj", "q_proj"), is_tail("other_head", "head")
    (True, False)
    """
    return fnmatchcase(path, tail) or fnmatchcase(path, f"*.{tail}")


def resolve(model: nn.Module, targets: Iterable[str]) -> list[Site]:
    """The sites that `targets` (roles, groups, globs on module paths) name; every entry must match.

    Raises:
        NoSuchTarget: an entry matches nothing; the message gives the nearest roles and paths.
    """
    sites, chosen = sites_of(model), []
    for target in targets:
        matched = matching(sites, target, model)
        if not matched:
            raise _no_such_target(model, target, sites)
        chosen += matched
    return _in_model_order(model, chosen)


def matching(sites: list[Site], target: str, model: nn.Module) -> list[Site]:
    """The sites one target names: a role, a group, or a glob on module paths; `role@glob` has to be both."""
    if "@" in target:
        role, _, glob = target.partition("@")
        return [site for site in matching(sites, role, model) if is_tail(site.path, glob)]
    if target in GROUPS:
        whole = [fused for fused, parts in FUSED.items() if set(parts) <= set(GROUPS[target])]
        sliced = {site.path for site in sites if site.slice}
        return [s for s in sites if s.role in GROUPS[target] or (s.role in whole and s.path not in sliced)]
    by_role = [site for site in sites if site.role == target]
    return by_role or _by_path(sites, target, model)


def _by_path(sites: list[Site], target: str, model: nn.Module) -> list[Site]:
    known: dict[str, list[Site]] = {}
    for site in sites:
        if site.slice is None:
            known.setdefault(site.path, []).append(site)
    paths = [(path, module) for path, module in modules_of(model) if is_tail(path, target)]
    found = [s for path, module in paths for s in known.get(path) or [Site(path, "other", None, layout_of(module))]]
    stacked = (site for each in known.values() for site in each if site.experts)
    return found + [site for site in stacked if is_tail(f"{site.path}.{site.parameter}", target)]


def _in_model_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    order = {path: number for number, (path, _) in enumerate(modules_of(model))}

    def place(site: Site) -> tuple[int, int, int]:
        return order[site.path], site.experts.number if site.experts else -1, site.slice.start if site.slice else -1

    return sorted({site.key: site for site in sites}.values(), key=place)


def _no_such_target(model: nn.Module, target: str, sites: list[Site]) -> NoSuchTarget:
    roles = {site.role for site in sites} | {group for group in GROUPS if matching(sites, group, model)}
    tails = {path.rsplit(".", 1)[-1] for path, _ in modules_of(model)} - set("0123456789")
    have = roles if "." in target and "*" not in target else roles | {t for t in tails if not t.isdigit()}
    return NoSuchTarget(f"no module of {type(model).__name__} matches the target {target!r}; {nearest(target, have)}")


def slice_of(data: Any) -> Slice | None:
    """Read a slice back from its saved form (a list of four numbers, or None)."""
    return None if data is None else Slice(*data)


def weight_at(module: nn.Module, part: Slice | None) -> Tensor:
    """The matrix W (out, in) of a layer, or a slice's rows of it: a view of the module's own where it can be one.

    That of a quantised layer is what its codes stand for.
    """
    layout = layout_of(module)
    if layout is None:
        raise BadMethod(f"a {kind_of(module)} has no weight matrix; leave it out of the targets")
    weight_OI = layout.matrix(floats_of(module, WEIGHT, module.get_parameter(WEIGHT).detach()))
    return weight_OI if part is None else part.take(weight_OI, 0)
