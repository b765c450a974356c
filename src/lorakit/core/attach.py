"""Attach an adapter to a model, detach it, and list what it trains."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorakit.core.delta import Delta
from lorakit.core.insertion import is_watched, unwatch, watch
from lorakit.core.method import Method, build
from lorakit.core.plan import BIAS, Plan
from lorakit.core.routing import depart, hook, route, routing_for, unhook
from lorakit.core.sites import ADAPTERS
from lorakit.core.stack import stack_of
from lorakit.core.state import (
    Adapters,
    Attached,
    State,
    adapters_of,
    attached_to,
    claim,
    deltas_of,
    require_unmerged,
    set_state,
    state_of,
    state_or_new,
)
from lorakit.errors import BadMethod, BadState

_IGNORED = "_keys_to_ignore_on_save"  # transformers' list of keys that save_pretrained leaves out


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    active: bool = True,
    statistics: Mapping[Any, Any] | None = None,
) -> None:
    """Attach a fresh, trainable adapter; the base is frozen and stays as it is, to the bit.

    The model keeps its class, keys and forward; the adapter acts through forward hooks. With `active` (the default) the
    adapter is in force from now on; otherwise whatever is in force stays so.

    Args:
        model: any `nn.Module`, most usefully a transformers model.
        method: what to train and where, e.g. `LoRA(rank=8, targets=("attn.q", "attn.v"))`.
        name: any non-empty text.
        active: whether to switch to the new adapter.
        statistics: what `lorakit.core.calibrate.calibrate` found, for methods and initialisations that start from data.

    Raises:
        NoSuchTarget: a target matches no module.
        BadMethod: the method does not fit the model (rank too large, tied weights), or is none.
        BadState: the name is taken, or an adapter is merged. The model is untouched after any error.

    Example:
        >>> import lorakit as lk
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
        >>> lk.attach(model, lk.LoRA(rank=4, targets=("attn.q", "attn.v")), name="reviews")
        >>> sum(p.numel() for p in lk.parameters(model))
        512
    """
    if not isinstance(model, nn.Module) or not isinstance(method, Method):
        raise BadMethod(f"attach takes a model and a method, as in attach(model, LoRA(rank=8)), not "
                        f"{reprlib.repr(model if isinstance(method, Method) else method)}")  # fmt: skip
    missing = method.needs() if statistics is None else None
    if missing:
        raise BadMethod(f"{method.name} starts from statistics of data ({', '.join(sorted(missing))}); gather them: "
                        "attach(..., statistics=calibrate(model, method.sites(model), batches))")  # fmt: skip
    plan = method.plan(model, statistics)
    method.check(plan, model)
    deltas = new_deltas(model, method, plan)
    method.start([delta for _, delta in deltas if not delta.placement.is_replaced], model, statistics)
    put(model, name, Attached(method, plan, trainable=True), deltas, active=active)


def new_deltas(
    model: nn.Module, method: Method, plan: Plan, whole: Plan | None = None
) -> list[tuple[nn.Module, Delta]]:
    """Build the deltas of a plan (or of a part of the `whole` plan) beside their modules; the model is not changed."""
    shared, built = method.shared(plan if whole is None else whole, model), []
    for placement in plan:
        module = model.get_submodule(placement.path)
        built.append((module, build(method, placement, module, shared)))
    return built


def put(
    model: nn.Module, name: str, record: Attached, deltas: list[tuple[nn.Module, Delta]], *, active: bool
) -> None:
    """Hang built deltas onto their modules, after everything that can be refused has been checked."""
    state = state_or_new(model)
    _check(model, state, name, record)
    if not state.attached:
        _freeze(model, state)
        state.attributes = {key: value for key, value in vars(model).items() if key == _IGNORED}
        set_state(model, state)
    state.attached[name] = record
    for module, delta in deltas:
        _adapters(module, state).add(name, delta.to(_device(module)).requires_grad_(record.trainable))
        hook(module)
    if any(record.method.inserts):
        stack = stack_of(model)
        _adapters(stack, state)
        watch(model, stack)
    _leave_out_on_save(model, state)
    if active:
        route(model, routing_for(model, name))


def _device(module: nn.Module) -> torch.device | None:
    own = next(module.parameters(), None)  # of the whole module: a block has none of its own
    return None if own is None else own.device


def _check(model: nn.Module, state: State, name: str, record: Attached) -> None:
    plan = record.plan
    require_unmerged(state, "attach")
    if not name or not isinstance(name, str):
        raise BadState("an adapter needs a name: attach(model, method, name='reviews')")
    if name in state.attached:
        raise BadState(f"an adapter is already called {name!r}; detach it first or choose another name")
    refuse_tied(model, record.method, plan)
    if any(record.method.inserts):
        stack_of(model)
    _refuse_absent(model, plan)
    for path in {placement.path for placement in plan}:
        if not isinstance(getattr(model.get_submodule(path), ADAPTERS, Adapters(state)), Adapters):
            raise BadMethod(f"{path} has an attribute called {ADAPTERS!r} of its own, so it cannot be adapted")


def refuse_tied(model: nn.Module, method: Method, plan: Plan) -> None:
    """Refuse an adapter on one of two tied modules: it would act on half of what the shared weight does.

    Raises:
        BadMethod: a placement's module shares its weight with another.
    """
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(path)
    tied = {path: paths for paths in holders.values() if len(paths) > 1 for path in paths}
    for placement in plan:
        minded = placement.kind != BIAS and (placement.is_replaced or method.minds_ties(placement))
        if placement.path in tied and minded:
            others = " and ".join(path for path in tied[placement.path] if path != placement.path)
            raise BadMethod(
                f"{placement.path} shares its weight with {others}, so an adapter on it would act on half of what that "
                "weight does; choose other targets, or give each a weight of its own first"
            )


def _refuse_absent(model: nn.Module, plan: Plan) -> None:
    """A layer whose weight is elsewhere (offloaded, sharded away) cannot carry an adapter beside it."""
    whole_is_meta = all(parameter.is_meta for parameter in model.parameters())
    for placement in plan:
        module = model.get_submodule(placement.path)
        elsewhere = not whole_is_meta or "_hf_hook" in vars(module)  # accelerate's, which fetches weights for a forward
        if any((own.is_meta and elsewhere) or own.numel() == 0 for own in module.parameters(recurse=False)):
            raise BadState(
                f"the weight of {placement.path} is not here (offloaded to CPU or disk, or sharded by ZeRO-3), which "
                "lorakit does not support; load the model without offloading"
            )


def _adapters(module: nn.Module, state: State) -> Adapters:
    child = module._modules.get(ADAPTERS)
    if not isinstance(child, Adapters):
        child = Adapters(state)
        module.add_module(ADAPTERS, child)
    return child


def _freeze(model: nn.Module, state: State) -> None:
    for path, parameter in model.named_parameters():
        state.required_grad[path] = parameter.requires_grad
        parameter.requires_grad_(False)


def _leave_out_on_save(model: nn.Module, state: State) -> None:
    """`save_pretrained` writes the base alone."""
    if not hasattr(type(model), _IGNORED):
        return
    theirs = state.attributes.get(_IGNORED, getattr(type(model), _IGNORED)) or []
    model.__dict__[_IGNORED] = [*theirs, *(key for key in model.state_dict() if ADAPTERS in key.split("."))]


def detach(model: nn.Module, name: str) -> None:
    """Remove an adapter without a trace; the last one to go gives every `requires_grad` back.

    If the adapter was in force, the base is from now on.

    Raises:
        NoSuchAdapter: no adapter of that name.
        BadState: an adapter is merged, or another thread has the model in use.
    """
    attached_to(model, name)
    state = state_of(model)
    claim(state)
    require_unmerged(state, "detach")
    del state.attached[name]
    inserting = any(any(record.method.inserts) for record in state.attached.values())
    if not inserting:
        unwatch(model)
    for _, module, adapters in list(adapters_of(model)):
        depart(module)
        adapters.remove(name)
        if not inserting:
            unwatch(module)
        if adapters._modules:
            hook(module)
            continue
        unhook([module])
        if not is_watched(module):
            del module._modules[ADAPTERS]
    if not state.attached:
        _forget(model, state)
        return
    _leave_out_on_save(model, state)
    if state.routing is not None:
        route(model, state.routing.among(tuple(state.attached)))


def _forget(model: nn.Module, state: State) -> None:
    route(model, None)
    for path, flag in state.required_grad.items():
        model.get_parameter(path).requires_grad_(flag)
    model.__dict__.pop(_IGNORED, None)
    model.__dict__.update(state.attributes)
    set_state(model, None)


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable parameters of one adapter, or of all of them: what an optimiser gets.

    Raises:
        BadState: nothing is attached.
        NoSuchAdapter: no adapter of that name.
    """
    names = list(state_of(model).attached) if name is None else [name]
    found = (p for each in names for delta in deltas_of(model, each) for p in delta.parameters() if p.requires_grad)
    return list({id(parameter): parameter for parameter in found}.values())
