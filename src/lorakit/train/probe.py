"""What autograd keeps of a forward pass, counted on a copy of the model without values: it takes no memory and no time.

Legend: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


class Kept(NamedTuple):
    """Bytes kept for backward: `fixed` whatever is read, and `per_token`; counted by a `probe` or by the `formula`."""

    per_token: float
    fixed: float
    source: str = "formula"


def skeleton(model: Model) -> Model:
    """A copy of the model on the meta device: its modules, hooks and ties, no values; the model is not changed.

    >>> bare = skeleton(nn.Linear(2, 3))
    >>> bare.weight.shape, bare.weight.device.type
    (torch.Size([3, 2]), 'meta')
    """
    bare: dict[int, Any] = {}
    for parameter in model.parameters():
        bare[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    bare |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, bare)


def probe(bare: Any, length: int, device: str) -> Kept | None:
    """What training the skeleton of a model keeps of sequences of `length` tokens; None if it cannot be run so.

    The bytes of all distinct storages that autograd saves, without parameters and buffers. One and two sequences tell
    what is kept for each. On `device` attention is one fused kernel, except on a CPU with dropout inside it.
    """
    try:
        one, two = (kept_bytes(bare, rows, length, device) for rows in (1, 2))
    except Exception as error:  # a model without values can fail wherever its code asks for one
        log.info("%s cannot be run without values, so a formula is used: %s", type(bare).__name__, error)
        return None
    return Kept((two - one) / length, 2 * one - two, "probe")


def kept_bytes(bare: Any, rows: int, length: int, device: str) -> int:
    """Bytes that autograd saves of a forward pass of a model's body over so many sequences, in training mode."""
    own = {_storage(tensor) for tensor in (*bare.parameters(), *bare.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no number is given twice

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    ids_BT = torch.ones(rows, length, dtype=torch.long, device="meta")
    options = {} if bare.get_output_embeddings() is None else {"use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _WithoutValues(device):
        bare.train().base_model(input_ids=ids_BT, **options)
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _WithoutValues(TorchFunctionMode):
    """Fused attention on the meta device, and answers to what models ask of values: a full batch without padding."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is F.scaled_dot_product_attention and not (self.device == "cpu" and _dropped(args, kwargs)):
                return _FusedAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
            if func in _ANSWERS:
                return _ANSWERS[func]
        return func(*args, **kwargs)


_ANSWERS: Mapping[Any, bool] = {
    Tensor.__bool__: True,  # positions are consecutive, masks are full
    Tensor.__contains__: False,  # padding is not among the tokens
}


def _dropped(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p"))


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys, values, the output, and a log-sum for each query."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        out_BHTD = torch.empty_like(q_BHTD)  # strides as the kernels give them
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, out_BHTD, q_BHTD.new_empty(q_BHTD.shape[:-1], dtype=torch.float))
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError
