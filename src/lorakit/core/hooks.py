"""Take forward hooks off modules again, by the function that was registered."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def drop_hooks(module: nn.Module, ours: Collection[Callable[..., Any]]) -> None:
    """Remove these functions from a module's forward hooks and pre-hooks, with what PyTorch notes about them."""
    pre: Any = module._forward_pre_hooks
    post: Any = module._forward_hooks
    options = (
        (pre, (module._forward_pre_hooks_with_kwargs,)),
        (post, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    )
    for hooks, notes in options:
        for number in [number for number, found in hooks.items() if found in ours]:
            del hooks[number]
            for note in notes:
                note.pop(number, None)
