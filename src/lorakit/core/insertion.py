"""Positions that a method puts into the sequence (prefixes), and takes out again, so that callers never see them.

The *stack* (the module that turns token ids into hidden states) reads a longer sequence and gives hidden states of the
length it was given. Inside, the present routing says which positions were put in, and a prefix's deltas act there.

Legend: B batch, T tokens given, L tokens after insertion, N positions put in, H hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.hooks import drop_hooks
from lorakit.core.route import Inserted, Routing
from lorakit.core.sites import ADAPTERS, family_of, sites_of
from lorakit.core.state import Adapters, State, state_of, state_or_new
from lorakit.errors import BadData, BadMethod, BadRouting

Numbers = tuple[int, int]  # positions before the tokens, and between context and target
_ONE_A_TOKEN = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0}  # inputs, and what an inserted place gets


def stack_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks and is called with token ids.

    Raises:
        BadMethod: the model has none (it reads images, say).
    """
    return model.get_submodule(stack_path(model))


def stack_path(model: nn.Module) -> str:
    """The path of the stack ("" for the model itself)."""
    path = next((site.path for site in sites_of(model) if site.role == "block"), "")
    while path:
        path = path.rpartition(".")[0]
        if "input_ids" in _names(model.get_submodule(path)):
            return path
    raise BadMethod(f"{type(model).__name__} has no blocks that read token ids, so nothing can be put between its tokens")


@contextmanager
def contexts(model: nn.Module, ends_B: Tensor) -> Iterator[None]:
    """Tell where each row's context ends and its target begins, while the model runs on a batch.

    Without it, a context is the whole row.
    """
    state = state_or_new(model)
    before, state.context_ends_B = state.context_ends_B, ends_B
    try:
        yield
    finally:
        state.context_ends_B = before


def watch(model: nn.Module, stack: nn.Module) -> None:
    """Let the stack read what routed methods insert; watching twice is watching once."""
    if not is_watched(stack):
        stack.register_forward_pre_hook(lengthen, with_kwargs=True)
        stack.register_forward_hook(shorten, always_call=True)
        model.register_forward_pre_hook(notice_labels, with_kwargs=True)
        model.register_forward_hook(forget_labels, always_call=True)


def unwatch(module: nn.Module) -> None:
    """Undo `watch`, on the model or on its stack."""
    drop_hooks(module, (lengthen, shorten, notice_labels, forget_labels))


def is_watched(module: nn.Module) -> bool:
    """Whether the module is a watched stack."""
    return lengthen in module._forward_pre_hooks.values()


def notice_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The model's forward pre-hook: where there are labels for each token, they tell where a target begins."""
    labels, state = kwargs.get("labels"), state_of(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return  # those are the decoder's, the context is what the encoder reads
    if isinstance(labels, Tensor) and labels.dim() == 2 and state.context_ends_B is None:
        state.context_ends_B, state.labels_told = (labels != -100).int().argmax(1), True


def forget_labels(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The model's forward hook."""
    state = state_of(model)
    if state.labels_told:
        state.context_ends_B, state.labels_told = None, False


def lengthen(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The stack's forward pre-hook: put the routed method's positions into the sequence."""
    state = cast(Adapters, stack._modules[ADAPTERS]).state
    numbers = _inserts(state)
    if not any(numbers):
        return args, kwargs
    given = dict(zip(_names(stack), args, strict=False)) | kwargs
    given.pop("cache_position", None)  # the stack counts its own
    if given.get("input_ids") is None:
        raise BadRouting("a prefix is put between token ids; call the model with input_ids, not inputs_embeds")
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise BadRouting("a prefix needs an attention mask (batch, tokens) or none, not one of pairs of tokens")
    past = _length_of(given.get("past_key_values"))
    return (), _continued(state, given, numbers) if past else _begun(stack, state, given, numbers)


def shorten(stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The stack's forward hook: take the positions out of the hidden states again."""
    state = cast(Adapters, stack._modules[ADAPTERS]).state
    inserted = None if state.routing is None else state.routing.inserted
    if state.routing is None or inserted is None:
        return output
    state.routing = replace(state.routing, inserted=None)
    return _kept(output, inserted)


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _inserts(state: State) -> Numbers:
    routing = state.routing
    alone = routing is not None and routing.rows is None and routing.weights is None
    return state.attached[routing.names[0]].method.inserts if routing is not None and alone else (0, 0)


def _length_of(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _begun(stack: nn.Module, state: State, given: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    """The inputs of a forward over a whole sequence, lengthened."""
    ids_BT, mask_BT, family = given["input_ids"], given.get("attention_mask"), family_of(stack)
    state.ends_B = _ends(state, ids_BT, mask_BT)
    order_BL = _order(ids_BT.shape[1], state.ends_B, numbers, family.leading)
    _refuse_too_long(stack, order_BL.shape[1], sum(numbers))
    own_BT = order_BL.argsort(1)[:, : ids_BT.shape[1]]
    if not family.bidirectional:  # the place that predicts the next token
        own_BT = torch.cat([own_BT[:, 1:], torch.full_like(own_BT[:, :1], order_BL.shape[1])], 1) - 1
    index_BL = torch.where(order_BL < ids_BT.shape[1], -1, order_BL - ids_BT.shape[1])
    known = numbers[1] == 0 or torch.compiler.is_compiling()
    key = (numbers, *ids_BT.shape, *(() if known else state.ends_B.tolist()))
    state.routing = replace(cast(Routing, state.routing), inserted=Inserted(key, index_BL, own_BT))
    return _rearranged(given, order_BL, _filler(stack))


def _continued(state: State, given: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    """The inputs of a forward that goes on from a cache, which holds the inserted positions already."""
    mask_BT, positions = given.get("attention_mask"), given.get("position_ids")
    if positions is not None:
        given = given | {"position_ids": positions + sum(numbers)}
    if mask_BT is None:
        return given
    ends_B = mask_BT.new_zeros(len(mask_BT)) if state.ends_B is None else state.ends_B
    if numbers[1] and len(ends_B) != len(mask_BT):
        raise BadRouting("the batch is not the one whose cache this is, so its contexts' ends are not known")
    ends_B = ends_B if len(ends_B) == len(mask_BT) else ends_B.new_zeros(len(mask_BT))
    order_BL = _order(mask_BT.shape[1], ends_B, numbers, 0)
    return given | {"attention_mask": _gathered(mask_BT, order_BL, 1)}


def _ends(state: State, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Where each row's context ends: as told, or after its last token."""
    told = state.context_ends_B
    if told is not None:
        return told.to(ids_BT.device)
    if mask_BT is None:
        return torch.full_like(ids_BT[:, 0], ids_BT.shape[1])
    places_T = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)
    return cast(Tensor, (mask_BT.to(places_T.dtype) * places_T).amax(1))


def _order(tokens: int, ends_B: Tensor, numbers: Numbers, leading: int) -> Tensor:
    """For each place of the longer sequence, the token that stands there, or `tokens` + the number of an insertion."""
    prefix, infix = numbers
    batch, device = len(ends_B), ends_B.device
    keys_BT = torch.arange(tokens, device=device, dtype=torch.float64).expand(batch, -1)
    before_BP = torch.full((batch, prefix), leading - 0.5, device=device, dtype=torch.float64)
    between_BI = (ends_B.to(torch.float64)[:, None] - 0.5).expand(-1, infix)
    return torch.cat([keys_BT, before_BP, between_BI], 1).argsort(dim=1, stable=True)


def _rearranged(given: dict[str, Any], order_BL: Tensor, filler: int) -> dict[str, Any]:
    fills = {**_ONE_A_TOKEN, "input_ids": filler}
    new = {
        name: _gathered(given[name], order_BL, cast(int, fill))
        for name, fill in fills.items()
        if given.get(name) is not None
    }
    if given.get("position_ids") is not None:
        mask_BL = new.get("attention_mask", torch.ones_like(order_BL))
        new["position_ids"] = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
    return given | new


def _gathered(values_BT: Tensor, order_BL: Tensor, fill: int) -> Tensor:
    extra = order_BL.shape[1] - values_BT.shape[1]
    return torch.cat([values_BT, values_BT.new_full((len(values_BT), extra), fill)], 1).gather(1, order_BL)


def _filler(stack: nn.Module) -> int:
    """A token id that is not the padding: what stands where a prefix is put in."""
    return 1 if getattr(stack.config, "pad_token_id", None) == 0 else 0


def _refuse_too_long(stack: nn.Module, length: int, inserted: int) -> None:
    most = getattr(stack.config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise BadData(f"a batch of {length - inserted} tokens and a prefix of {inserted} need {length} positions, but the "
                      f"model has {most}; cut the examples (max_length) or take fewer prefix tokens")  # fmt: skip


def _kept(output: Any, inserted: Inserted) -> Any:
    """The output with every (B, L, H) tensor in it shortened to (B, T, H)."""
    if isinstance(output, Tensor):
        if output.dim() != 3 or output.shape[:2] != inserted.index_BL.shape:
            return output
        return output.gather(1, inserted.kept_BT[:, :, None].expand(-1, -1, output.shape[2]))
    if isinstance(output, Mapping):
        return type(output)(**{key: _kept(value, inserted) for key, value in output.items()})
    return tuple(_kept(each, inserted) for each in output) if isinstance(output, tuple) else output
