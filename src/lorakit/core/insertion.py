"""Positions that a method puts into the sequence (prefixes), and takes out again, so that callers never see them.

The *stack* (the module that turns token ids into hidden states) reads a longer sequence and gives hidden states of the
length it was given. Inside, the routing says which places were put in, and a prefix's deltas act there.

Legend: B batch, T tokens given, L places after insertion, N places put in, P of them before the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lorakit.core.hooks import drop_hooks
from lorakit.core.positions import UNLABELLED
from lorakit.core.route import Inserted, Routing
from lorakit.core.sites import ADAPTERS
from lorakit.core.stack import Reading, inputs_of
from lorakit.core.state import Adapters, State, claim, free, hold, is_claimed, is_held, state_of, state_or_new
from lorakit.errors import BadData, BadRouting

Numbers = tuple[int, int]  # places before the tokens, and between context and target
_WHOLE: Final = -1  # the end of a context that is the whole row


@dataclass(frozen=True)
class _Layout:
    """The places of a longer sequence: where each token given stands, and each of those put in."""

    own_BT: Tensor
    put_BN: Tensor

    @property
    def length(self) -> int:
        return self.own_BT.shape[1] + self.put_BN.shape[1]

    def longer(self, values_BT: Tensor, fill: int) -> Tensor:
        """One value a token, with `fill` at the places put in."""
        longer_BL = values_BT.new_full((len(self.own_BT), self.length), fill)
        return longer_BL.scatter(1, self.own_BT, values_BT.expand(len(self.own_BT), -1))

    def index(self) -> Tensor:
        """For each place the number of what was put there, -1 for tokens."""
        numbers_N = torch.arange(self.put_BN.shape[1], device=self.put_BN.device)
        none_BL = self.put_BN.new_full((len(self.put_BN), self.length), -1)
        return none_BL.scatter(1, self.put_BN, numbers_N.expand_as(self.put_BN))

    def predicting(self) -> Tensor:
        """For each token the last place before the next one."""
        end_B1 = torch.full_like(self.own_BT[:, :1], self.length)
        return torch.cat([self.own_BT[:, 1:], end_B1], 1) - 1


def _layout(tokens: int, start_B: Tensor, ends_B: Tensor, numbers: Numbers) -> _Layout:
    prefix, infix = numbers
    places_T = torch.arange(tokens, device=start_B.device)
    after_start_BT, after_context_BT = places_T >= start_B[:, None], places_T >= ends_B[:, None]
    own_BT = places_T + prefix * after_start_BT.long() + infix * after_context_BT.long()
    before_BP = start_B[:, None] + torch.arange(prefix, device=start_B.device)
    between_BI = ends_B[:, None] + prefix + torch.arange(infix, device=start_B.device)
    return _Layout(own_BT, torch.cat([before_BP, between_BI], 1))


def longest_insertion(model: nn.Module) -> int:
    """The most places that an attached adapter puts into a sequence."""
    return max((sum(record.method.inserts) for record in state_or_new(model).attached.values()), default=0)


@contextmanager
def contexts(model: nn.Module, ends_B: Tensor) -> Iterator[None]:
    """Tell where each row's context ends and its target begins, while the model runs on a batch.

    Without it (and for rows where the end is -1), a context is the whole row. One number holds for all rows.
    """
    state = state_or_new(model)
    before, state.context_ends_B = state.context_ends_B, ends_B
    try:
        yield
    finally:
        state.context_ends_B = before


def inserts_of(state: State) -> Numbers:
    """How many places the adapter in force puts in."""
    routing = state.routing
    alone = routing is not None and routing.rows is None and routing.weights is None
    return state.attached[routing.names[0]].method.inserts if routing is not None and alone else (0, 0)


def generate_after_context(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` where all that is given is context, however often it is read again; unless contexts are told."""
    given, state = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), state_of(model)
    told = state.context_ends_B is not None or cast(Reading, state.reading).bidirectional
    if told or not isinstance(given, Tensor):
        return cast(Any, type(model)).generate(model, *args, **kwargs)
    with contexts(model, torch.tensor([given.shape[1]])):
        return cast(Any, type(model)).generate(model, *args, **kwargs)


def watch(model: nn.Module, stack: nn.Module) -> None:
    """Let the stack read what routed methods insert; watching twice is watching once."""
    state_of(model).reading = Reading.of(stack)
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


def _given(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of the module's forward, by name or by its place."""
    if len(args) < 2 or name in kwargs:
        return kwargs.get(name)
    return dict(zip(inputs_of(module), args, strict=False)).get(name)


def notice_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The model's forward pre-hook: where there are labels for each token, they tell where a target begins."""
    state = state_of(model)
    _claim(state)
    _forget_told(state)
    labels, reading = _given("labels", model, args, kwargs), cast(Reading, state.reading)
    if reading.bidirectional or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return  # what is read is all context
    if isinstance(labels, Tensor) and labels.dim() == 2 and state.context_ends_B is None:
        labelled_BT = labels != UNLABELLED
        state.context_ends_B = torch.where(labelled_BT.any(1), labelled_BT.int().argmax(1), _WHOLE)
        state.labels_told = True


def forget_labels(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The model's forward hook."""
    state = state_of(model)
    if not is_claimed(state):
        _forget_told(state)


def _forget_told(state: State) -> None:
    if state.labels_told:
        state.context_ends_B, state.labels_told = None, False


def lengthen(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The stack's forward pre-hook: put the routed method's places into the sequence."""
    state = cast(Adapters, stack._modules[ADAPTERS]).state
    _claim(state)
    numbers = inserts_of(state)
    if not any(numbers):
        state.within = None
        return args, kwargs
    _hold(state, stack)
    state.within = None
    reading = cast(Reading, state.reading)
    given = dict(zip(reading.names, args, strict=False)) | kwargs
    given.pop("cache_position", None)  # the stack counts its own
    _refuse_unreadable(given, reading)
    past = _length_of(given.get("past_key_values"))
    if past:
        return (), _continued(given, numbers, past, reading)
    return (), _begun(state, given, numbers, reading)


def shorten(stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The stack's forward hook: take the places out of the hidden states again."""
    state = cast(Adapters, stack._modules[ADAPTERS]).state
    compiling = torch.compiler.is_compiling()
    if not compiling and is_held(state, stack):
        return output
    within, state.within = state.within, None
    if not compiling:
        free(state, stack)
    return output if within is None or within.inserted is None else _kept(output, within.inserted)


def _claim(state: State) -> None:
    if not torch.compiler.is_compiling():
        claim(state, recomputing=torch._C._current_graph_task_id() != -1)


def _hold(state: State, stack: nn.Module) -> None:
    if not torch.compiler.is_compiling():
        hold(state, stack, recomputing=torch._C._current_graph_task_id() != -1)


def _length_of(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _refuse_unreadable(given: Mapping[str, Any], reading: Reading) -> None:
    ids_BT, mask, positions = given.get("input_ids"), given.get("attention_mask"), given.get("position_ids")
    if ids_BT is None:
        raise BadRouting("a prefix is put between token ids; call the model with input_ids, not inputs_embeds")
    if ids_BT.dim() != 2 or (positions is not None and positions.dim() != 2):
        raise BadRouting("a prefix needs token ids and position ids (batch, tokens), without a third dimension")
    if getattr(given.get("past_key_values"), "is_compileable", False):
        raise BadRouting("a cache of fixed size has no room for a prefix; generate without cache_implementation")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise BadRouting("a prefix needs an attention mask (batch, tokens) or none, not pairs of tokens (packing)")
    if given.get("token_type_ids") is not None and reading.types_are_words:
        raise BadRouting("this model reads token types as words, where a prefix would count twice; leave them out")


def _begun(state: State, given: dict[str, Any], numbers: Numbers, reading: Reading) -> dict[str, Any]:
    """The inputs of a forward over a whole sequence, lengthened."""
    ids_BT, mask_BT = given["input_ids"], given.get("attention_mask")
    if mask_BT is not None and mask_BT.shape != ids_BT.shape:
        raise BadRouting(f"an attention mask {tuple(mask_BT.shape)} does not fit token ids {tuple(ids_BT.shape)}")
    _refuse_too_long(ids_BT.shape[1] + sum(numbers), sum(numbers), reading)
    first_B = _first(ids_BT, mask_BT)
    start_B = first_B + reading.leading
    ends_B = torch.maximum(_ends(state, ids_BT, mask_BT), start_B)
    layout = _layout(ids_BT.shape[1], start_B, ends_B, numbers)
    if not torch.compiler.is_compiling():
        _refuse_broken(given, first_B)
    kept_BT = layout.own_BT if reading.bidirectional else layout.predicting()
    key = _key(state, ids_BT, mask_BT, numbers, start_B, ends_B)
    state.within = replace(cast(Routing, state.routing), inserted=Inserted(key, layout.index(), kept_BT))
    return given | _longer(given, layout, first_B, reading)


def _continued(given: dict[str, Any], numbers: Numbers, past: int, reading: Reading) -> dict[str, Any]:
    """The inputs of a forward that goes on from a cache, which holds the places put in already."""
    ids_BT, mask_BT, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    _refuse_too_long(past + ids_BT.shape[1], sum(numbers), reading)
    changed: dict[str, Any] = {}
    if positions is not None:
        changed["position_ids"] = positions + sum(numbers)
    if mask_BT is not None:
        _refuse_foreign(mask_BT, ids_BT, past, numbers)
        first_B = _first(mask_BT, mask_BT)
        layout = _layout(mask_BT.shape[1], first_B, first_B, (sum(numbers), 0))  # all ones, wherever after the padding
        changed["attention_mask"] = layout.longer(mask_BT, 1)
    return given | changed


def _first(like_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The first token of each row that is not padding."""
    return like_BT.new_zeros(len(like_BT), dtype=torch.long) if mask_BT is None else (mask_BT != 0).int().argmax(1)


def _ends(state: State, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Where each row's context ends: as told, or after its last token."""
    batch, tokens = ids_BT.shape
    whole_B = ids_BT.new_full((batch,), tokens, dtype=torch.long)
    if mask_BT is not None:
        whole_B = tokens - (mask_BT != 0).flip(1).int().argmax(1)
    told = state.context_ends_B
    if told is None:
        return whole_B
    if len(told) not in (1, batch):
        raise BadRouting(f"contexts tells where {len(told)} rows end, but the batch has {batch} rows")
    return torch.where(told.to(ids_BT.device) < 0, whole_B, told.to(ids_BT.device))


def _key(
    state: State, ids_BT: Tensor, mask_BT: Tensor | None, numbers: Numbers, start_B: Tensor, ends_B: Tensor
) -> tuple[object, ...]:
    """What the layout follows from, as plain values."""
    tokens = ids_BT.shape[1]
    if torch.compiler.is_compiling() or (mask_BT is None and state.context_ends_B is None):
        return (numbers, *ids_BT.shape)
    starts, ends = torch.stack([start_B, ends_B]).tolist()
    if max(ends, default=0) > tokens:
        raise BadRouting(
            f"a context ends at {max(ends)} in rows of {tokens} tokens; an infix needs the whole context at once (in "
            "generate, without prefill_chunk_size)"
        )
    return (numbers, *ids_BT.shape, *starts, *ends)


def _longer(given: Mapping[str, Any], layout: _Layout, first_B: Tensor, reading: Reading) -> dict[str, Any]:
    fills = {"input_ids": reading.filler, "attention_mask": 1, "token_type_ids": 0}
    new = {name: layout.longer(given[name], fill) for name, fill in fills.items() if given.get(name) is not None}
    positions = given.get("position_ids")
    if positions is not None:
        counted_BL = new.get("attention_mask", torch.ones_like(new["input_ids"])).long().cumsum(1)
        first_B1 = positions.expand(len(first_B), -1).gather(1, first_B[:, None])
        new["position_ids"] = (first_B1 + counted_BL - 1).clamp(min=0)
    return new


def _refuse_broken(given: Mapping[str, Any], first_B: Tensor) -> None:
    """Refuse positions that start again, as those of packed sequences do: each sequence would need its own prefix."""
    positions, mask_BT = given.get("position_ids"), given.get("attention_mask")
    if positions is None:
        return
    real_BT = torch.ones_like(given["input_ids"]) if mask_BT is None else mask_BT.long()
    start_BT = positions - real_BT.cumsum(1)
    if bool(((start_BT != start_BT.gather(1, first_B[:, None])) & real_BT.bool()).any()):
        raise BadRouting(
            "a prefix needs rows of one sequence each, with positions that count on; these position_ids start again or "
            "leave some out, as those of packed sequences do"
        )


def _refuse_foreign(mask_BT: Tensor, ids_BT: Tensor, past: int, numbers: Numbers) -> None:
    """Refuse a cache that does not hold exactly what the mask says and the places put in."""
    new, all_there = ids_BT.shape[1], mask_BT.shape[1] + sum(numbers)
    if past + new != all_there:
        raise BadRouting(
            f"the cache holds {past} places and {new} tokens are new, but the attention mask and this adapter's prefix "
            f"make {all_there}; a cache that was begun without the prefix, or cut since, cannot be continued: read the "
            "whole sequence again"
        )
    if numbers[1] and not torch.compiler.is_compiling() and bool((mask_BT[:, 1:] < mask_BT[:, :-1]).any()):
        raise BadRouting("padding lies between the cached tokens, so the infix's place is not known; pad on the left")


def _refuse_too_long(length: int, inserted: int, reading: Reading) -> None:
    if reading.longest is not None and length > reading.longest:
        raise BadData(
            f"{length - inserted} tokens and a prefix of {inserted} need {length} positions, but the model has "
            f"{reading.longest}; give {reading.longest - inserted} tokens at most, or take a shorter prefix"
        )


def _kept(output: Any, inserted: Inserted) -> Any:
    """The output with every (B, L, H) tensor in it shortened to (B, T, H)."""
    if isinstance(output, Tensor):
        if output.dim() != 3 or output.shape[:2] != inserted.index_BL.shape:
            return output
        kept_BT = inserted.kept_BT.to(output.device)
        return output.gather(1, kept_BT[:, :, None].expand(-1, -1, output.shape[2]))
    if isinstance(output, Mapping):
        return type(output)(**{key: _kept(value, inserted) for key, value in output.items()})
    return tuple(_kept(each, inserted) for each in output) if isinstance(output, tuple) else output
