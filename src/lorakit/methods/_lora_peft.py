"""LoRA in PEFT's words: the fields of `adapter_config.json` and the names and shapes of its tensors.

Stacked experts are PEFT's `target_parameters`: A is (E R, in), all rows of one expert together, B (out, R E), all
experts of one rank together. PEFT wraps a module once for each of its parameters, the first innermost, and names the
tensors by the wrapper, not the parameter. It knows no dropout there, and refuses a config that tells one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.experts import WEIGHT, experts_of
from lorakit.core.keys import wrappers
from lorakit.core.layouts import Conv1DLayout, Conv2dLayout, Layout
from lorakit.core.patterns import BEYOND, UNLOADED, alpha_of, commonest, fields_of, pattern_faults, residual
from lorakit.core.plan import Placement
from lorakit.core.sites import modules_of, resolve
from lorakit.errors import BadAdapterFile, NoSuchTarget
from lorakit.methods import _peft as peft

A_NAMES, B_NAMES = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")
READ = {
    "r": int,
    "lora_alpha": float | None,
    "target_modules": list[str] | str | None,
    "target_parameters": list[str] | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "lora_dropout": float | None,
    "bias": Literal["none", "all", "lora_only"] | None,
    "modules_to_save": list[str] | None,
}


class Pair(Protocol):
    """What this file needs to know of a low-rank delta: A (R, in), B (out, R), one or one an expert, and its place."""

    placement: Placement
    layout: Layout
    A: nn.Parameter
    B: nn.Parameter

    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors of the whole update, with what it began with."""

    def keep_start(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """Take B0 A0 off the update."""


def is_lora(config: Any, *, dora: bool) -> bool:
    """Whether a PEFT config is LoRA's, with or without DoRA's magnitudes."""
    return config.get("peft_type") == "LORA" and bool(config.get("use_dora")) == dora


def write(
    deltas: Sequence[Pair], *, rooted: bool, extra: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config's fields and the tensors; `rooted` scales by alpha / sqrt(r)."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    stacked: list[str] = []
    for name, whole, group in _blocks(deltas):
        a_RI, b_OR = _together(group)
        ranks[whole] = a_RI.shape[-2]
        share = ranks[whole] / _first(group).rank  # 2 where the update began with B0 A0
        alphas[whole] = _first(group).alpha * (math.sqrt(share) if rooted else share)
        tensors |= _named(name, group[0].layout, a_RI, b_OR)
        stacked += [whole] if a_RI.dim() > 2 else []
    config = {
        **fields_of(ranks, alphas),
        "target_modules": [path for path in ranks if path not in stacked],
        "target_parameters": stacked or None,
        "fan_in_fan_out": any(isinstance(delta.layout, Conv1DLayout) for delta in deltas),
        "init_lora_weights": True,
        "use_dora": False,
    }
    return config | dict(extra) | ({"lora_dropout": 0.0} if stacked else {}), tensors


class _Block(NamedTuple):
    """What a file holds of one layer, or of one parameter of stacked experts."""

    name: str  # in the file
    whole: str  # the path of the layer, or of the parameter
    deltas: list[Pair]  # one, or one a slice


def _blocks(deltas: Sequence[Pair]) -> Iterator[_Block]:
    for path, group in peft.by_path(deltas).items():
        found: dict[str, list[Pair]] = {}
        for delta in group:
            found.setdefault(delta.placement.parameter, []).append(delta)
        for name, (parameter, own) in zip(wrappers(path, len(found)), found.items(), strict=True):
            yield _Block(name, path if parameter == WEIGHT else f"{path}.{parameter}", own)


def _together(group: list[Pair]) -> tuple[Tensor, Tensor]:
    """One A and B for all slices of a layer: A stacked, B block by block, scales brought to one."""
    pairs = [tuple(factor.detach() for factor in delta.pair()) for delta in group]
    first = group[0].placement.slice
    if len(group) == 1 and first is None:
        return pairs[0][0], pairs[0][1]
    a_RI, b_OR = torch.cat([a_RI for a_RI, _ in pairs], -2), pairs[0][1]
    width = b_OR.shape[-2] if first is None else first.stride * first.count
    b_OR, at = b_OR.new_zeros(*b_OR.shape[:-2], width, a_RI.shape[-2]), 0
    for delta, (_, own) in zip(group, pairs, strict=True):
        end = at + own.shape[-1]
        columns, ratio, part = b_OR[..., at:end], _ratio(delta, group), delta.placement.slice
        new = own * ratio if ratio != 1.0 else own
        b_OR[..., at:end] = new if part is None else part.put(columns, new, -2)
        at = end
    return a_RI, b_OR


def _first(group: Sequence[Pair]) -> Placement:
    """The first slice that acts: one of alpha 0 has no scale to bring others to."""
    return next((delta.placement for delta in group if delta.placement.scale), group[0].placement)


def _ratio(delta: Pair, group: Sequence[Pair]) -> float:
    """A slice's scale in units of the one that its whole layer is written with."""
    scale = _first(group).scale
    return delta.placement.scale / scale if scale else 1.0


def _named(path: str, layout: Layout, a_RI: Tensor, b_OR: Tensor) -> dict[str, Tensor]:
    if a_RI.dim() > 2:
        return {f"{path}.lora_A.weight": a_RI.flatten(0, 1), f"{path}.lora_B.weight": b_OR.permute(1, 2, 0).flatten(1)}
    if layout.lookup:
        return {f"{path}.lora_embedding_A": a_RI, f"{path}.lora_embedding_B": b_OR}
    if isinstance(layout, Conv2dLayout):
        a_RI, b_OR = a_RI.reshape(-1, layout.channels, *layout.kernel), b_OR[:, :, None, None]
    return {f"{path}.lora_A.weight": a_RI, f"{path}.lora_B.weight": b_OR}


def read(deltas: Sequence[Pair], tensors: dict[str, Tensor]) -> list[str]:
    """Copy A and B into the deltas, splitting blocks into slices; used tensors leave `tensors`; faults come back."""
    faults: list[str] = []
    for block in _blocks(deltas):
        _make_room(block, tensors)
        a_RI, b_OR = _together(block.deltas)
        want = _named(block.name, block.deltas[0].layout, a_RI, b_OR)
        found = {name: tensors.pop(name, None) for name in want}
        for name, tensor in found.items():
            if tensor is None:
                faults.append(f"{name} is missing")
            elif tensor.shape != want[name].shape:
                faults.append(f"{name} has shape {tuple(tensor.shape)}, the model needs {tuple(want[name].shape)}")
        if not faults:
            a_RI, b_OR = _as_ours(a_RI.shape, *(tensor for tensor in found.values() if tensor is not None))
            _copy(block.deltas, a_RI, b_OR)
    return faults


def _as_ours(shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A file's tensors as matrices, or as matrices (E, R, in) and (E, out, R) of experts if A has such a shape."""
    if len(shape) == 2:
        return a.flatten(1), b.flatten(1)
    return a.unflatten(0, tuple(shape[:-1])), b.unflatten(1, (-1, shape[0])).permute(2, 0, 1)


def _make_room(block: _Block, tensors: Mapping[str, Tensor]) -> None:
    """A file with twice the rank holds [A; A0] and [B, -B0]: make room for what the update began with."""
    stored = next((tensors[block.name + end] for end in A_NAMES if block.name + end in tensors), None)
    rows = sum(math.prod(delta.A.shape[:-1]) for delta in block.deltas)
    if stored is not None and stored.dim() and len(stored) == 2 * rows:
        for delta in block.deltas:
            delta.keep_start(delta.A, delta.B)


@torch.no_grad()
def _copy(group: list[Pair], a_RI: Tensor, b_OR: Tensor) -> None:
    at = 0
    for delta in group:
        (mine, _), rank = delta.pair(), delta.placement.rank
        rows, ratio = slice(at, at + mine.shape[-2]), _ratio(delta, group)
        part, block, read_a = delta.placement.slice, b_OR[..., rows], a_RI[..., rows, :]
        own = block if part is None else part.take(block, -2)
        own = own / ratio if ratio not in (0.0, 1.0) else own
        delta.A.copy_(read_a[..., :rank, :])
        delta.B.copy_(own[..., :rank])
        if mine.shape[-2] > rank:
            delta.keep_start(read_a[..., rank:, :], -own[..., rank:])
        at = rows.stop


def fields(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """LoRA's fields from a PEFT config and the tensors beside it."""
    used = [words for key, words in {**BEYOND, **UNLOADED}.items() if config.get(key)]
    faults = [f"it uses {words}, which lorakit's LoRA cannot read" for words in used] + residual(config)
    faults += misfits(config, READ, "its adapter_config.json") or pattern_faults(config)
    stacked = {} if faults else _stacked(config.get("target_parameters") or (), model)
    rows = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    found = {name[: -len(end)]: count for name, count in rows.items() for end in A_NAMES if name.endswith(end)}
    ranks = {}
    for name, count in found.items():
        whole, experts = stacked.get(name, (name, 1))
        ranks[whole] = count // experts
        faults += [f"{name} has {count} rows for {experts} experts"] if count % experts else []
    if not ranks:
        faults.append("it has no LoRA tensors")
    alphas = {} if faults else {path: alpha_of(config, path, rank, faults) for path, rank in ranks.items()}
    if faults:
        raise BadAdapterFile("the PEFT adapter", faults)
    rank, alpha = commonest(ranks.values(), 8), commonest(alphas.values(), 16.0)
    return {
        "rank": rank,
        "alpha": float(alpha),
        "targets": _targets(config, set(ranks), {whole for whole, _ in stacked.values()}, model),
        "ranks": {path: r for path, r in ranks.items() if r != rank},
        "alphas": {path: float(a) for path, a in alphas.items() if a != alpha},
        "scaling": "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
        "dropout": float(config.get("lora_dropout") or 0.0),
        "bias": config.get("bias") or "none",
        "train": peft.trained(config, tensors),
    }


def _stacked(told: Sequence[str], model: nn.Module) -> dict[str, tuple[str, int]]:
    """PEFT's names of the wrappers around experts, each with its parameter's path and the number of experts."""
    found: dict[str, tuple[str, int]] = {}
    for path, module in modules_of(model):
        own = {f"{path}.{name}": experts.count for name, experts in experts_of(module).items()}
        meant = [(whole, count) for whole, count in own.items() if any(f".{whole}".endswith(f".{t}") for t in told)]
        found |= dict(zip(wrappers(path, len(meant)), meant, strict=True))
    return found


def _targets(config: Mapping[str, Any], found: set[str], stacked: set[str], model: nn.Module) -> tuple[str, ...]:
    """The config's own short names where they mean exactly what is in the file, otherwise full paths."""
    short = peft.targets(config.get("target_modules"), found - stacked, model)
    targets = (*short, *sorted(config.get("target_parameters") or ()))
    try:
        sites = resolve(model, targets)
    except NoSuchTarget:
        return tuple(sorted(found))
    meant = {site.path if site.parameter == WEIGHT else f"{site.path}.{site.parameter}" for site in sites}
    return targets if meant == found else tuple(sorted(found))
