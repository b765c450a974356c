"""What PEFT's configs of several methods have in common: targets, modules trained whole, and patterns on paths."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.plan import Placement
from lorakit.core.sites import is_tail, modules_of
from lorakit.errors import BadAdapterFile

log = logging.getLogger("lorakit")
WHERE = {"target_modules": list[str] | str | None, "modules_to_save": list[str] | None}
CONFIG = "its adapter_config.json"


class Placed(Protocol):
    """What has a place in the plan."""

    @property
    def placement(self) -> Placement:
        """Its place."""


P = TypeVar("P", bound=Placed)


def refuse_misfits(config: Mapping[str, Any], wanted: Mapping[str, Any], faults: Iterable[str] = ()) -> None:
    """Refuse a config whose entries have other types than those `wanted`, or that has `faults` already.

    Raises:
        BadAdapterFile: every fault.
    """
    found = [*faults, *misfits(config, {**WHERE, **wanted}, CONFIG)]
    if found:
        raise BadAdapterFile("the PEFT adapter", found)


def paths_of(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    """The paths of the layers that have a tensor of this ending, sorted.

    Raises:
        BadAdapterFile: there is none.
    """
    paths = sorted(name.removesuffix(ending) for name in tensors if name.endswith(ending))
    if not paths:
        raise BadAdapterFile("the PEFT adapter", [f"it has no tensors that end in {ending}"])
    return paths


def by_path(deltas: Sequence[P]) -> dict[str, list[P]]:
    """Deltas by their layer's path, sorted: PEFT holds a layer's slices as one."""
    groups: dict[str, list[P]] = {}
    for delta in deltas:
        groups.setdefault(delta.placement.path, []).append(delta)
    return dict(sorted(groups.items()))


def taken(needed: Mapping[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of these names and shapes, taken out of `tensors`, and what is wrong with them.

    >>> import torch
    >>> taken({"q.b": (2,)}, {"q.b": torch.ones(3)})
    ({}, ['q.b has shape (3,), the model needs (2,)'])
    """
    found, faults = {}, []
    for key, shape in needed.items():
        value = tensors.pop(key, None)
        if value is None:
            faults.append(f"{key} is missing")
        elif value.shape != shape:
            faults.append(f"{key} has shape {tuple(value.shape)}, the model needs {shape}")
        else:
            found[key] = value
    return found, faults


def targets(given: Any, paths: set[str], model: nn.Module) -> tuple[str, ...]:
    """The config's own short target names where they mean exactly the layers in the file, otherwise full paths."""
    if isinstance(given, list):
        tails = tuple(f".{target}" for target in given)
        meant = {path for path, _ in modules_of(model) if f".{path}".endswith(tails)}
        if meant == paths:
            return tuple(sorted(given))
    return tuple(sorted(paths))


def trained(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Those of `modules_to_save` that the file has."""
    return tuple(module for module in config.get("modules_to_save") or () if _is_saved(module, tensors))


def _is_saved(module: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(is_tail(name, f"{module}.weight") or f".{module}." in f".{name}" for name in tensors)


def pattern_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Patterns that are no regular expressions."""
    for key in [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"its pattern {key!r} cannot be read ({error})"


def rank_of(config: Mapping[str, Any], path: str) -> Any:
    """The rank that a config tells for one layer; None where it tells none."""
    patterns = config.get("rank_pattern") or {}
    return next((rank for key, rank in patterns.items() if matches(key, path)), config.get("r"))


def alpha_of(config: Mapping[str, Any], path: str, rank: int, faults: list[str], key: str = "lora_alpha") -> float:
    """The alpha of one layer: PEFT takes the first matching pattern, after sorting them on save.

    The sorting loses the author's order, so the rank that a pattern gives is checked against the tensor: where the
    first match is wrong, the matching pattern of the right rank is the author's, for alpha too.
    """
    rank_patterns, alpha_patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    matched = [pattern for pattern in rank_patterns if matches(pattern, path)]
    default = float(8 if config.get(key) is None else config[key])  # 8 is PEFT's own default
    first = next((float(a) for pattern, a in alpha_patterns.items() if matches(pattern, path)), default)
    expected = rank_patterns[matched[0]] if matched else config.get("r", rank)
    if expected == rank:
        return first
    fitting = [pattern for pattern in matched if rank_patterns[pattern] == rank]
    if not fitting:
        faults.append(f"{path} has rank {rank}, but the config says {expected}")
        return first
    log.warning("rank_pattern of %s was reordered by PEFT; rank %d of its tensors decides", path, rank)
    return float(alpha_patterns.get(fitting[0], first))


def matches(key: str, path: str) -> bool:
    """Whether a pattern of PEFT's means a layer."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def commonest(values: Any, default: Any) -> Any:
    """The value that stands most often."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def plain(number: float) -> float | int:
    """A whole number as an integer, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number
