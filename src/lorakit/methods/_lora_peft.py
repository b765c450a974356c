"""LoRA in PEFT's words: the fields of `adapter_config.json` and the names and shapes of its tensors.

Ranks and scales are written without ambiguity: `r` and `lora_alpha` are the commonest values, and every other layer has
a pattern of its own that is its escaped full path, so the order of patterns cannot matter.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.layouts import Conv1DLayout, Conv2dLayout, Layout
from lorakit.core.plan import Placement
from lorakit.core.sites import is_tail, modules_of
from lorakit.errors import BadAdapterFile

log = logging.getLogger("lorakit")
A_NAMES, B_NAMES = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")
READ = {
    "r": int,
    "lora_alpha": float | None,
    "target_modules": list[str] | str | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "lora_dropout": float | None,
    "bias": Literal["none", "all", "lora_only"] | None,
    "modules_to_save": list[str] | None,
}
UNREADABLE = {
    "lora_bias": "a bias on lora_B",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
}


class Pair(Protocol):
    """What this file needs to know of a low-rank delta: A (R, in), B (out, R) and where they act."""

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
    for path, group in _by_path(deltas):
        a_RI, b_OR = _block(group)
        ranks[path] = a_RI.shape[0]
        share = ranks[path] / _first(group).rank  # 2 where the update began with B0 A0
        alphas[path] = _first(group).alpha * (math.sqrt(share) if rooted else share)
        tensors |= _named(path, group[0].layout, a_RI, b_OR)
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 16.0)
    config = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": list(ranks),
        "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(path): _plain(a) for path, a in alphas.items() if a != alpha},
        "fan_in_fan_out": any(isinstance(delta.layout, Conv1DLayout) for delta in deltas),
        "init_lora_weights": True,
        "use_dora": False,
    }
    return config | dict(extra), tensors


def _by_path(deltas: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
    ordered = sorted(deltas, key=lambda delta: delta.placement.path)  # stable: slices keep the plan's order
    for path, group in groupby(ordered, key=lambda delta: delta.placement.path):
        yield path, list(group)


def _block(group: list[Pair]) -> tuple[Tensor, Tensor]:
    """One A and B for all slices of a layer: A stacked, B block by block, scales brought to one."""
    pairs = [tuple(factor.detach() for factor in delta.pair()) for delta in group]
    if len(group) == 1 and group[0].placement.slice is None:
        return pairs[0][0], pairs[0][1]
    rank = sum(len(a_RI) for a_RI, _ in pairs)
    b_OR, at = pairs[0][1].new_zeros(group[0].layout.out_features, rank), 0
    for delta, (a_RI, own) in zip(group, pairs, strict=True):
        end = at + len(a_RI)
        columns, ratio, part = b_OR[:, at:end], _ratio(delta, group), delta.placement.slice
        new = own * ratio if ratio != 1.0 else own
        b_OR[:, at:end] = new if part is None else part.put(columns, new, 0)
        at = end
    return torch.cat([a_RI for a_RI, _ in pairs]), b_OR


def _first(group: Sequence[Pair]) -> Placement:
    """The first slice that acts: one of alpha 0 has no scale to bring others to."""
    return next((delta.placement for delta in group if delta.placement.scale), group[0].placement)


def _ratio(delta: Pair, group: Sequence[Pair]) -> float:
    """A slice's scale in units of the one that its whole layer is written with."""
    scale = _first(group).scale
    return delta.placement.scale / scale if scale else 1.0


def _named(path: str, layout: Layout, a_RI: Tensor, b_OR: Tensor) -> dict[str, Tensor]:
    if layout.lookup:
        return {f"{path}.lora_embedding_A": a_RI, f"{path}.lora_embedding_B": b_OR}
    if isinstance(layout, Conv2dLayout):
        a_RI, b_OR = a_RI.reshape(-1, layout.channels, *layout.kernel), b_OR[:, :, None, None]
    return {f"{path}.lora_A.weight": a_RI, f"{path}.lora_B.weight": b_OR}


def _commonest(values: Any, default: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def read(deltas: Sequence[Pair], tensors: dict[str, Tensor]) -> list[str]:
    """Copy A and B into the deltas, splitting blocks into slices; used tensors leave `tensors`; faults come back."""
    faults: list[str] = []
    for path, group in _by_path(deltas):
        _make_room(group, tensors)
        want = _named(path, group[0].layout, *_block(group))
        found = {name: tensors.pop(name, None) for name in want}
        for name, tensor in found.items():
            if tensor is None:
                faults.append(f"{name} is missing")
            elif tensor.shape != want[name].shape:
                faults.append(f"{name} has shape {tuple(tensor.shape)}, the model needs {tuple(want[name].shape)}")
        if not faults:
            a_RI, b_OR = (tensor.flatten(1) for tensor in found.values() if tensor is not None)
            _copy(group, a_RI, b_OR)
    return faults


def _make_room(group: list[Pair], tensors: Mapping[str, Tensor]) -> None:
    """A file with twice the rank holds [A; A0] and [B, -B0]: make room for what the update began with."""
    path = group[0].placement.path
    stored = next((tensors[path + end] for end in A_NAMES if path + end in tensors), None)
    rank = sum(delta.placement.rank for delta in group)
    if stored is not None and stored.dim() and len(stored) == 2 * rank:
        for delta in group:
            delta.keep_start(delta.A, delta.B)


@torch.no_grad()
def _copy(group: list[Pair], a_RI: Tensor, b_OR: Tensor) -> None:
    at = 0
    for delta in group:
        (mine, _), rank = delta.pair(), delta.placement.rank
        rows, ratio = slice(at, at + len(mine)), _ratio(delta, group)
        part, block, read_a = delta.placement.slice, b_OR[:, rows], a_RI[rows]
        own = block if part is None else part.take(block, 0)
        own = own / ratio if ratio not in (0.0, 1.0) else own
        delta.A.copy_(read_a[:rank])
        delta.B.copy_(own[:, :rank])
        if len(mine) > rank:
            delta.keep_start(read_a[rank:], -own[:, rank:])
        at = rows.stop


def fields(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """LoRA's fields from a PEFT config and the tensors beside it."""
    used = [words for key, words in UNREADABLE.items() if config.get(key)]
    faults = [f"it uses {words}, which lorakit's LoRA cannot read" for words in used]
    faults += misfits(config, READ, "its adapter_config.json") or _pattern_faults(config)
    rows = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    ranks = {name[: -len(end)]: rank for name, rank in rows.items() for end in A_NAMES if name.endswith(end)}
    if not ranks:
        faults.append("it has no LoRA tensors")
    alphas = {} if faults else {path: _alpha(config, path, rank, faults) for path, rank in ranks.items()}
    if faults:
        raise BadAdapterFile("the PEFT adapter", faults)
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 16.0)
    return {
        "rank": rank,
        "alpha": float(alpha),
        "targets": _targets(config.get("target_modules"), set(ranks), model),
        "ranks": {path: r for path, r in ranks.items() if r != rank},
        "alphas": {path: float(a) for path, a in alphas.items() if a != alpha},
        "scaling": "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
        "dropout": float(config.get("lora_dropout") or 0.0),
        "bias": config.get("bias") or "none",
        "train": tuple(m for m in config.get("modules_to_save") or () if _is_saved(m, tensors)),
    }


def _pattern_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key in [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"its pattern {key!r} cannot be read ({error})"


def _alpha(config: Mapping[str, Any], path: str, rank: int, faults: list[str]) -> float:
    """The alpha of one layer: PEFT takes the first matching pattern, after sorting them on save.

    The sorting loses the author's order, so the rank that a pattern gives is checked against the tensor: where the
    first match is wrong, the matching pattern of the right rank is the author's, for alpha too.
    """
    rank_patterns, alpha_patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    matched = [key for key in rank_patterns if _matches(key, path)]
    default = float(8 if config.get("lora_alpha") is None else config["lora_alpha"])  # 8 is PEFT's own default
    first = next((float(a) for key, a in alpha_patterns.items() if _matches(key, path)), default)
    expected = rank_patterns[matched[0]] if matched else config.get("r", rank)
    if expected == rank:
        return first
    fitting = [key for key in matched if rank_patterns[key] == rank]
    if not fitting:
        faults.append(f"{path} has rank {rank}, but the config says {expected}")
        return first
    log.warning("rank_pattern of %s was reordered by PEFT; rank %d of its tensors decides", path, rank)
    return float(alpha_patterns.get(fitting[0], first))


def _matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _is_saved(module: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(is_tail(name, f"{module}.weight") or f".{module}." in f".{name}" for name in tensors)


def _targets(given: Any, paths: set[str], model: nn.Module) -> tuple[str, ...]:
    """The config's own short target names where they mean exactly the layers in the file, otherwise full paths."""
    if isinstance(given, list):
        tails = tuple(f".{target}" for target in given)
        meant = {path for path, _ in modules_of(model) if f".{path}".endswith(tails)}
        if meant == paths:
            return tuple(sorted(given))
    return tuple(sorted(paths))
