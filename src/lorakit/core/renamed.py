"""Layers that an older transformers called otherwise: the same numbered blocks below another path."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor, nn

from lorakit.core.sites import modules_of

log = logging.getLogger("lorakit")
_BLOCK = re.compile(r"(.*?)(\w+\.\d+)\..+")  # language_model.model. layers.0 .self_attn.q_proj


def renamed(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors by this model's names, where only the path above its blocks is another one.

    A path is changed only if the model has no such blocks and has them below exactly one other path.
    """
    paths = [path for path, _ in modules_of(model)]
    roots = {root: _root_here(root, blocks, paths) for root, blocks in _roots(tensors).items()}
    changed = {root: here for root, here in roots.items() if here is not None}
    for root, here in changed.items():
        log.warning("the file's blocks lie below %r, this model's below %r: taken for the same", root, here)
    return {_moved(name, changed): value for name, value in tensors.items()}


def _roots(names: Mapping[str, Tensor]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        if parts := _BLOCK.fullmatch(name):
            found.setdefault(parts[1], set()).add(parts[2])
    return found


def _root_here(root: str, blocks: set[str], paths: list[str]) -> str | None:
    """The one path below which the model has these blocks; None where the file's is right, or none or several are."""
    if any(f"{root}{block}" in paths for block in blocks):
        return None
    each = [{path.removesuffix(block) for path in paths if f".{path}".endswith(f".{block}")} for block in blocks]
    common = set.intersection(*each)
    return common.pop() if len(common) == 1 else None


def _moved(name: str, changed: Mapping[str, str]) -> str:
    parts = _BLOCK.fullmatch(name)
    return changed[parts[1]] + name[len(parts[1]) :] if parts and parts[1] in changed else name
