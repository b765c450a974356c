"""What PEFT's configs of several methods have in common: targets, modules trained whole, and patterns on paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.plan import Placement
from lorakit.core.sites import is_tail, modules_of
from lorakit.errors import BadAdapterFile

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
