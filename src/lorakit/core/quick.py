"""Where a fast twin may stand in: what has to be true of a module and of the tensors of this call."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def is_frozen_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the module does no more than multiply by its frozen weight and add its frozen bias.

    >>> is_frozen_linear(nn.Linear(2, 2).requires_grad_(False)), is_frozen_linear(nn.Linear(2, 2))
    (True, False)
    """
    own: Any = [value for value in module._parameters.values() if value is not None]
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    watched = module._backward_hooks or module._backward_pre_hooks or len(module._forward_hooks) > 1
    return plain and not watched and all(type(p) is nn.Parameter and not p.requires_grad for p in own)


def fits_one_step(x: Tensor, y: Tensor) -> bool:
    """Whether a step of autograd written by hand can take this call.

    A compiler makes its own steps, autocast its own casts, `torch.func` its own derivatives.
    """
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if torch.compiler.is_compiling() or casts:
        return False
    plain = type(x) is Tensor and type(y) is Tensor and x.dtype == y.dtype and y.is_contiguous()
    return plain and torch._C._functorch.peek_interpreter_stack() is None
