"""Which module first made something that is no finite number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def first_bad(model: nn.Module, run: Callable[[], object], trained: Mapping[str, nn.Parameter]) -> str:
    """Where a pass through the model first goes wrong, in words; "" if nowhere. `run` is it, forward and backward."""
    found: list[str] = []
    with _watched(model, found):
        run()
    if found:
        return f"the first module whose output is not finite is {found[0]}"
    bad = next((key for key, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())), None)
    return f"all outputs are finite, but the gradient of {bad} is not" if bad else ""


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the paths of leaf modules (and of those adapted) whose output is not finite, in the order of their calls."""

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(path or type(module).__name__)

        return look

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
