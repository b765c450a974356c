"""Where a fast twin may stand in: what has to be true of a module and of the tensors of this call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


@dataclass(frozen=True, slots=True)
class Twin:
    """A module's forward for one tensor of one dtype; the module's own for any other call."""

    module: nn.Module
    of: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].dtype == self.dtype:
            return self.of(args[0])
        return type(self.module).forward(self.module, *args, **kwargs)


def is_frozen_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the module does no more than multiply by its frozen weight and add its frozen bias.

    >>> is_frozen_linear(nn.Linear(2, 2).requires_grad_(False)), is_frozen_linear(nn.Linear(2, 2))
    (True, False)
    """
    own: Any = [value for value in module._parameters.values() if value is not None]
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    plain = plain and isinstance(module.__dict__.get("forward"), Twin | None)
    watched = module._backward_hooks or module._backward_pre_hooks or len(module._forward_hooks) > 1
    frozen = all(type(p) is nn.Parameter and not p.requires_grad for p in own)
    return plain and frozen and not watched and not _has_any_global_hook()


def fits_one_step(x: Tensor, y: Tensor) -> bool:
    """Whether a step of autograd written by hand can take this call.

    A compiler makes its own steps, autocast its own casts, `torch.func` and forward mode their own derivatives.
    """
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if traced or casts or forward_ad._current_level >= 0:
        return False
    plain = type(x) is Tensor and type(y) is Tensor and x.dtype == y.dtype and y.is_contiguous()
    return plain and torch._C._functorch.peek_interpreter_stack() is None
