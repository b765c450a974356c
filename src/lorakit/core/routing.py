"""Which adapter acts: `use`, and the one forward hook through which every adapter acts.

The hook is a module-level function that reads `module.adapters`: a closure would be shared by `copy.deepcopy` and
could not be pickled.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta, act_on_rows, before_rows, changes_input, stands_in
from lorakit.core.hooks import drop_hooks
from lorakit.core.insertion import generate_after_context, inserts_of
from lorakit.core.plan import BIAS
from lorakit.core.recompute import marked
from lorakit.core.route import Routing
from lorakit.core.sites import ADAPTERS, unbatched
from lorakit.core.state import (
    Adapters,
    State,
    adapters_of,
    attached_to,
    claim,
    deltas_of,
    free,
    hold,
    is_held,
    require_unmerged,
    state_of,
)
from lorakit.errors import BadRouting

What = str | None | Sequence[str | None] | Mapping[str, float]


class use:  # noqa: N801 - a verb that is also a context manager, like torch.no_grad
    """Switch the model's adapters: at once, and back again at the end of a `with` block.

    `what` is an adapter's name; None for the base; a list with one name (or None) a row of the batch; or a mapping of
    names to weights, which gives y0 + sum of w_i (delta_i(y0) - y0) at each site. Trainability does not change.
    Without a block the switch stays. While a block is open, other threads are refused the model.

    Raises:
        NoSuchAdapter: a name that is not attached.
        BadState: an adapter is merged, or another thread has the model in use.
        BadRouting: something else than that, an empty list, or a method that cannot be mixed or routed by row.

    Example:
        >>> import lorakit as lk
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **size))
        >>> lk.attach(model, lk.LoRA(rank=2), name="a")
        >>> with lk.use(model, ["a", None]):
        ...     logits = model(torch.ones(2, 3, dtype=torch.long)).logits   # row 0: adapter a, row 1: the base
    """

    def __init__(self, model: nn.Module, what: What) -> None:
        self._model, self._state = model, state_of(model)
        claim(self._state)
        require_unmerged(self._state, "use")
        self._before, self._owner = self._state.routing, self._state.owner
        route(model, routing_for(model, what))

    def __enter__(self) -> nn.Module:
        self._state.owner = threading.get_ident()
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.owner = self._owner
        if self._state.attached:
            before = self._before
            route(self._model, None if before is None else before.among(tuple(self._state.attached)))


def routing_for(model: nn.Module, what: What) -> Routing | None:
    """Turn what a user says into explicit state, checking every name."""
    if not _is_understood(what):
        raise BadRouting(f"use takes a name, None, a list of those for the rows of a batch, or {{name: weight}}, not "
                         f"{what!r}")  # fmt: skip
    if what is None:
        return None
    if isinstance(what, str):
        attached_to(model, what)
        return Routing((what,))
    if not what:
        raise BadRouting("use needs at least one adapter: a name, a list with one entry a row, or {name: weight}")
    if isinstance(what, Mapping):
        return _mixture(model, what)
    return _by_row(model, what)


def _is_understood(what: object) -> bool:
    if isinstance(what, Mapping):
        return all(isinstance(name, str) for name in what)
    rows = what if isinstance(what, Sequence) else (what,)
    return all(name is None or isinstance(name, str) for name in rows)


def _is_finite(weight: Any) -> bool:
    try:
        return math.isfinite(weight)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a text, a tensor of several numbers
        return False


def _mixture(model: nn.Module, weights: Mapping[str, float]) -> Routing:
    for name in weights:
        attached_to(model, name)
    if not all(map(_is_finite, weights.values())):
        raise BadRouting(f"the weights of a mixture have to be finite numbers, not {dict(weights)}")
    for name in weights:
        if unmixed := next((delta for delta in deltas_of(model, name) if not delta.mixes), None):
            raise BadRouting(f"{name!r} cannot be part of a mixture: {unmixed.placement.kind} is no change of "
                             "outputs that could be weighted")  # fmt: skip
    _refuse_two_sides(model, tuple(weights))
    return Routing(tuple(weights), weights=tuple(float(weight) for weight in weights.values()))


def _refuse_two_sides(model: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse changes of a layer's input beside those of its output: mixed, they are no change of its weight.

    A trained bias does not depend on the input.
    """
    for path, _, adapters in adapters_of(model):
        deltas = [each for name in names for each in adapters.deltas(name) if each.placement.kind != BIAS]
        kinds = {changes_input(delta): delta.placement.kind for delta in deltas}
        if len(kinds) > 1:
            raise BadRouting(f"at {path}, {kinds[True]} changes the layer's input and {kinds[False]} what it makes of "
                             "it, which cannot be parts of one mixture; use these adapters one at a time")  # fmt: skip


def _by_row(model: nn.Module, rows: Sequence[str | None]) -> Routing:
    for name in rows:
        if name is not None:
            attached_to(model, name)
    for name in dict.fromkeys(rows):
        if name is not None and (refusal := _refused_rows(model, name)):
            raise BadRouting(f"{name!r} cannot share a batch with other adapters: {refusal}")
    able = (name for name in state_of(model).attached if not _refused_rows(model, name))
    names = tuple(able)  # all of them: another assignment of rows changes no compiled code
    return Routing(names, rows=tuple(-1 if name is None else names.index(name) for name in rows))


def _refused_rows(model: nn.Module, name: str) -> str:
    """Why an adapter cannot be used by row; "" if it can."""
    if any(attached_to(model, name).method.inserts):
        return "it makes the sequence longer"
    paths = (placement.path for placement in attached_to(model, name).plan)
    apart = next(iter(unbatched(model, paths).items()), None)
    if apart is not None:
        return f"in {apart[0]} {apart[1]}; leave it out of the targets or use one adapter at a time"
    found = next((delta for delta in deltas_of(model, name) if not delta.per_row), None)
    return "" if found is None else f"{found.placement.path} ({found.placement.role}) has to be the same for all rows"


def route(model: nn.Module, routing: Routing | None) -> None:
    """Set the model's routing; `generate` repeats its rows for beams, and knows where the context ends for an infix."""
    state = state_of(model)
    state.routing, state.within = routing, None
    by_row, infix = routing is not None and routing.rows is not None, inserts_of(state)[1]
    if (by_row or infix) and callable(getattr(type(model), "generate", None)):
        model.__dict__["generate"] = partial(_generate_by_row if by_row else generate_after_context, model)
    else:
        model.__dict__.pop("generate", None)


def _generate_by_row(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state, config = state_of(model), kwargs.get("generation_config") or cast(Any, model).generation_config
    told = (kwargs.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences"))
    beams, sequences = told
    state.repeats = beams if beams > 1 else sequences
    try:
        return cast(Any, type(model)).generate(model, *args, **kwargs)
    finally:
        state.repeats = 1


def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward pre-hook of modules whose input or weights an adapter changes."""
    adapters = cast(Adapters, module._modules[ADAPTERS])
    depart(module)
    routing = _routing(module, adapters, adapters._modules)
    if routing is None:
        return args, kwargs
    if routing.rows_B is None:
        _hold(module, adapters, routing)
        shares = [None] if routing.weights_N is None else routing.weights_N.unbind()
        for key, share in zip(routing.keys, shares, strict=True):
            for delta in adapters.at(key):
                delta.enter(module, share)
    x = _prepared(adapters, routing, _first(args, kwargs))
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): x})


def _hold(module: nn.Module, adapters: Adapters, routing: Routing) -> None:
    putting_in = any(stands_in(delta) for key in routing.keys for delta in adapters.at(key))
    if putting_in and not torch.compiler.is_compiling():
        hold(adapters.state, module, recomputing=_is_recomputing())


def _prepared(adapters: Adapters, routing: Routing, x: Any) -> Any:
    if routing.rows_B is not None:
        turns = adapters.turns(routing.keys)
        early = [deltas for deltas in turns if any(delta is not None and changes_input(delta) for delta in deltas)]
        rows_B = _fit_rows(adapters.state, routing.rows_B.to(x.device), x) if early else routing.rows_B
        for deltas in early:
            x = before_rows(deltas, rows_B, x)
        return x
    if routing.weights_N is None:
        return _into(adapters, routing.keys[0], x)
    weights = routing.weights_N.to(x.device, x.dtype)
    changes = [weight * (_into(adapters, key, x) - x) for key, weight in zip(routing.keys, weights, strict=True)]
    return x + torch.stack(changes).sum(0)


def _into(adapters: Adapters, key: str, x: Any) -> Any:
    for delta in adapters.at(key):
        x = delta.before(x)
    return x


def depart(module: nn.Module, args: tuple[Any, ...] = (), output: Any = None) -> None:
    """The forward hook, called even after an error, of modules whose weights an adapter stands in for.

    Ctrl-C keeps PyTorch from calling it, so whoever needs the base's weights calls it first.
    """
    adapters = cast(Adapters, module._modules[ADAPTERS])
    compiling = torch.compiler.is_compiling()
    if not compiling and is_held(adapters.state, module):
        return
    for key in reversed(list(adapters._modules)):  # the last to enter found what the others had put in
        for delta in reversed(adapters.at(key)):
            delta.leave(module)
    if not compiling:
        free(adapters.state, module)


def adapt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: the module's output as the adapters in force change it; of several, the first changes."""
    adapters = cast(Adapters, module._modules[ADAPTERS])
    routing = _routing(module, adapters, adapters)
    y = output[0] if isinstance(output, tuple) else output
    if routing is not None and not torch.compiler.is_compiling():
        adapters.acted.update(routing.used)
    y = y if routing is None else _changed(module, adapters, routing, _first(args, kwargs), y)
    y = y if torch.compiler.is_compiling() else marked(y, routing)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def _routing(module: nn.Module, adapters: Adapters, place: object) -> Routing | None:
    """The routing of this call; `place` tells the hooks of one module apart."""
    state = adapters.state
    present = state.routing if state.within is None else state.within
    if torch.compiler.is_compiling():
        return present
    claim(state, recomputing=_is_recomputing())
    return state.recomputation.routing(present, place, training=module.training)


def _is_recomputing() -> bool:
    return torch._C._current_graph_task_id() != -1


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _changed(module: nn.Module, adapters: Adapters, routing: Routing, x: Any, y: Tensor) -> Tensor:
    if routing.rows_B is not None:
        return _on_rows(adapters, routing, x, y)
    if routing.weights_N is not None:
        return _mixed(adapters, routing, x, y)
    deltas = adapters.at(routing.keys[0])
    fast = deltas[0].through(module, x, y) if len(deltas) == 1 else None
    if fast is not None:
        return fast
    return _through(adapters, routing.keys[0], x, y, None if routing.inserted is None else routing.inserted.index_BL)


def _through(adapters: Adapters, key: str, x: Any, y: Tensor, inserted_BL: Tensor | None = None) -> Tensor:
    for delta in adapters.at(key):
        y = delta.act(x, y, inserted_BL)
    return y


def _mixed(adapters: Adapters, routing: Routing, x: Any, y: Tensor) -> Tensor:
    assert routing.weights_N is not None
    weights = routing.weights_N.to(y.device, y.dtype)
    changes = [weight * (_through(adapters, key, x, y) - y) for key, weight in zip(routing.keys, weights, strict=True)]
    return y + torch.stack(changes).sum(0)


def _on_rows(adapters: Adapters, routing: Routing, x: Any, y: Tensor) -> Tensor:
    turns = adapters.turns(routing.keys)
    if not turns:  # whatever is here takes no part, so this need not be a layer whose first dimension is the batch
        return y
    rows_B = _fit_rows(adapters.state, cast(Tensor, routing.rows_B).to(y.device), y)
    for deltas in turns:
        y = act_on_rows(deltas, rows_B, x, y)
    return y


def _fit_rows(state: State, rows_B: Tensor, y: Tensor) -> Tensor:
    size, have = y.shape[0], rows_B.shape[0]
    if size == have:
        return rows_B
    if size == have * state.repeats:
        return rows_B.repeat_interleave(state.repeats)
    raise BadRouting(
        f"use(model, [...]) names {have} rows but a layer's input has {size}; give one name a row (None for the base), "
        "and no targets in layers whose first dimension is not the batch"
    )


def hook(module: nn.Module) -> None:
    """Let the adapters act on a module, by the hooks that they need; hooking twice is hooking once."""
    children = [cast(nn.ModuleDict, child) for child in cast(Adapters, module._modules[ADAPTERS])._modules.values()]
    deltas = [cast(Delta, delta) for child in children for delta in child._modules.values()]
    if adapt not in module._forward_hooks.values():
        module.register_forward_hook(adapt, with_kwargs=True)
    standing = any(stands_in(delta) for delta in deltas)
    early = standing or any(changes_input(delta) for delta in deltas)
    drop_hooks(module, [ours for ours, needed in ((prepare, early), (depart, standing)) if not needed])
    if early and prepare not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(prepare, with_kwargs=True)
    if standing and depart not in module._forward_hooks.values():
        module.register_forward_hook(depart, always_call=True)


def unhook(modules: Iterable[nn.Module]) -> None:
    """Take the hooks off: the modules run the base's own code again."""
    for module in modules:
        drop_hooks(module, (prepare, adapt, depart))
