"""Fold an adapter into the weights (no extra latency) and take it out again, bit for bit.

Originals are kept, never recomputed: W += d; W -= d would change up to a third of the entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta, changes_input, stands_in
from lorakit.core.quantised import floats_of
from lorakit.core.routing import depart, hook, routing_for, unhook
from lorakit.core.state import State, adapters_of, claim, require_unmerged, state_of
from lorakit.errors import BadRouting, BadState, NotMergeable

Parts = Sequence[tuple[list[Delta], float | None]]


@torch.no_grad()
def merge(model: nn.Module, what: str | Mapping[str, float]) -> None:
    """Fold an adapter, or a weighted mixture of several, into the base's weights.

    Each new weight is computed in float32 and rounded once to the base's dtype. The model then runs its own code at its
    own speed, without hooks, and `save_pretrained` writes the merged weights. A quantised layer keeps floats until
    `unmerge`, what its codes stand for and the adapter's change: quantised again, they would lose most of that change.

    Raises:
        NotMergeable: a delta is not a change of weights, or gives a value that is not finite.
        BadRouting: neither a name nor a mixture.
        BadState: something is merged already. The model is untouched after any error.

    Example:
        >>> import lorakit as lk
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
        >>> lk.attach(model, lk.LoRA(rank=2), name="a")
        >>> lk.merge(model, "a"); lk.unmerge(model)
    """
    state = state_of(model)
    claim(state)
    require_unmerged(state, "merge")
    if not what or not isinstance(what, str | Mapping):
        raise BadRouting(f"merge takes an adapter's name or a mapping {{name: weight}}, not {what!r}")
    weights = {what: None} if isinstance(what, str) else dict(what)
    routing_for(model, what)
    try:
        for path, module, adapters in adapters_of(model):
            parts = [(deltas, weight) for name, weight in weights.items() if (deltas := adapters.deltas(name))]
            if parts:
                depart(module)
                _merge_module(state, path, module, parts)
    except BaseException:
        _restore(state)
        raise
    unhook(module for _, module, _ in adapters_of(model))
    state.merged = " + ".join(repr(name) for name in weights)


def _merge_module(state: State, path: str, module: nn.Module, parts: Parts) -> None:
    own = {name: p for deltas, _ in parts for delta in deltas for name, p in delta.weights(module).items()}
    new = folded({name: floats_of(module, name, parameter.detach()) for name, parameter in own.items()}, parts)
    for name, value in new.items():
        if not torch.isfinite(value).all():
            raise NotMergeable(f"merging gives {path}.{name} a value that is not finite")
    changed = {id(parameter) for parameter, _ in state.originals}  # by a module around this one, or one tied to it
    state.originals += [(own[name], own[name].data) for name in new if id(own[name]) not in changed]
    for name, value in new.items():
        own[name].data = value


def folded(values: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """One module's parameters with deltas folded in: W + sum of w_i (W_i - W), or W_1 for a lone adapter.

    `parts` pairs the deltas of each adapter with its weight (None: this adapter alone, taken whole).
    """
    wide = {name: value.float() for name, value in values.items()}
    results = [(_fold_all(wide, deltas), weight) for deltas, weight in parts]
    (first, alone), *_ = results
    if alone is not None:
        changed = dict.fromkeys(name for result, _ in results for name in result)
        first = {name: wide[name] + _change(name, wide, results) for name in changed}
    return {name: value.to(values[name].dtype) for name, value in first.items()}


def _fold_all(wide: Mapping[str, Tensor], deltas: list[Delta]) -> dict[str, Tensor]:
    """Fold what stands in for weights, then what acts on the output, in order, then on the input, last first."""
    new: dict[str, Tensor] = {}
    inner = [delta for delta in deltas if changes_input(delta)]
    outer = [delta for delta in deltas if not changes_input(delta)]
    for delta in [*sorted(outer, key=lambda delta: not stands_in(delta)), *reversed(inner)]:
        new |= delta.merged(dict(wide) | new)
    return new


def _change(name: str, wide: Mapping[str, Tensor], results: list[tuple[dict[str, Tensor], float | None]]) -> Tensor:
    parts = [(weight or 0.0) * (result[name] - wide[name]) for result, weight in results if name in result]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit; the adapters act as before the merge.

    Raises:
        BadState: nothing is merged.
    """
    state = state_of(model)
    if not state.merged:
        raise BadState("nothing is merged; call merge(model, name) first")
    _restore(state)
    for _, module, _ in adapters_of(model):
        hook(module)
    state.merged = ""


def _restore(state: State) -> None:
    for parameter, value in state.originals:
        parameter.data = value
    state.originals.clear()
