"""Where a model can be adapted: sites, their roles, and the targets a user names.

A *role* is the product's word for a place (`attn.q`, `mlp.down`, `embed`), the same in every model family. A family is
one small record that says under which module names the roles live; `families/infer.py` guesses it for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lorakit.core import registry
from lorakit.core.layouts import Layout, layout_of
from lorakit.errors import NoSuchTarget, nearest

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

    `layout` is None for modules that have no weight matrix of a known kind (norms, whole blocks).
    """

    path: str
    role: str
    slice: Slice | None = None
    layout: Layout | None = field(default=None, compare=False)

    @property
    def out_features(self) -> int:
        """Output units of the site: those of the slice, or of the whole layer."""
        if self.layout is None:
            raise ValueError(f"{self.path} has no weight matrix")
        return self.slice.width if self.slice else self.layout.out_features


@dataclass(frozen=True)
class Part:
    """The `index`-th of `of` equal stretches of a fused layer's output."""

    path: str
    index: int
    of: int


Where = str | Part | tuple[str, ...]  # a path, a part of a fused layer, or several paths


@dataclass(frozen=True)
class Family:
    """Where the roles live in one model family.

    `block` is the tail of a block's path (`layers.*`); `inside` maps roles to paths below a block, `outside` to path
    tails elsewhere; a role may have several (self- and cross-attention).
    """

    model_types: tuple[str, ...]
    block: str
    inside: Mapping[str, Where]
    outside: Mapping[str, str | tuple[str, ...]]


def family_of(model: nn.Module) -> Family:
    """The record of the model's family, or one inferred from its module names."""
    config = getattr(model, "config", None)
    for name in registry.names("lorakit.families"):
        module = registry.find("lorakit.families", name)
        if name != "infer" and getattr(config, "model_type", None) in module.FAMILY.model_types:
            return module.FAMILY
    return registry.find("lorakit.families", "infer").infer(model)


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
    block = re.compile(rf"(?:.*\.)?{re.escape(family.block).replace(re.escape('*'), '[0-9]+')}")
    found = []
    for path, module in modules_of(model):
        for role, where in _roles(path, family, block):
            layout = layout_of(module)
            found.append(Site(path, role, _slice(where, layout), layout))
    return found


def _roles(path: str, family: Family, block: re.Pattern[str]) -> Iterator[tuple[str, Where]]:
    inside = block.match(path)
    if inside and inside.end() == len(path):
        yield "block", ""
    if inside and path[inside.end() :].startswith("."):
        tail = path[inside.end() + 1 :]
        yield from ((role, where) for role, where in family.inside.items() if tail in _paths(where))
    else:
        for role, where in family.outside.items():
            if any(is_tail(path, tail) for tail in _paths(where)):
                yield role, where


def _paths(where: Where) -> tuple[str, ...]:
    return (where.path,) if isinstance(where, Part) else (where,) if isinstance(where, str) else where


def _slice(where: Where, layout: Layout | None) -> Slice | None:
    if not isinstance(where, Part) or layout is None:
        return None
    size = layout.out_features // where.of
    return Slice(where.index * size, size, layout.out_features)


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
    """The sites one target names: a role, a group, or a glob on module paths."""
    if target in GROUPS:
        whole = [fused for fused, parts in FUSED.items() if set(parts) <= set(GROUPS[target])]
        sliced = {site.path for site in sites if site.slice}
        return [s for s in sites if s.role in GROUPS[target] or (s.role in whole and s.path not in sliced)]
    by_role = [site for site in sites if site.role == target]
    return by_role or _by_path(sites, target, model)


def _by_path(sites: list[Site], target: str, model: nn.Module) -> list[Site]:
    known = {site.path: site for site in sites if site.slice is None}
    paths = [(path, module) for path, module in modules_of(model) if is_tail(path, target)]
    return [known.get(path) or Site(path, "other", None, layout_of(module)) for path, module in paths]


def _in_model_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    order = {path: number for number, (path, _) in enumerate(modules_of(model))}
    unique: dict[tuple[str, Slice | None], Site] = {(site.path, site.slice): site for site in sites}
    return sorted(unique.values(), key=lambda s: (order[s.path], s.slice.start if s.slice else -1))


def _no_such_target(model: nn.Module, target: str, sites: list[Site]) -> NoSuchTarget:
    roles = {site.role for site in sites} | {group for group in GROUPS if matching(sites, group, model)}
    tails = {path.rsplit(".", 1)[-1] for path, _ in modules_of(model)} - set("0123456789")
    have = roles if "." in target and "*" not in target else roles | {t for t in tails if not t.isdigit()}
    return NoSuchTarget(f"no module of {type(model).__name__} matches the target {target!r}; {nearest(target, have)}")


def slice_of(data: Any) -> Slice | None:
    """Read a slice back from its saved form (a list of four numbers, or None)."""
    return None if data is None else Slice(*data)
