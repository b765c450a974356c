"""What an adapter does on given text: which layers, output units, heads and tokens it moves, and how far.

Two things are told apart. `local` compares one layer with and without the adapter on the same input, that of the
adapted run: what this layer adds. `drift` compares two whole runs, in which changes of earlier layers add up.

Legend: B batch, T tokens, N counted positions, O output units, H heads, D units of a head or a hidden state, V ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.analyse.divergence import divergence, has_writer
from lorakit.analyse.listening import Listener, Sums
from lorakit.core.exchange import layer_of
from lorakit.core.mode import mode
from lorakit.core.positions import positions_of
from lorakit.core.sites import Site, sites_of
from lorakit.core.stack import inputs_of
from lorakit.core.state import attached_to
from lorakit.errors import BadData, BadState

_QKV = ("attn.q", "attn.k", "attn.v")


@dataclass(frozen=True, eq=False)
class LayerEffect:
    """What the adapter adds to one layer's output y, on the inputs of the adapted run."""

    path: str
    layer: int | None
    positions: int  # that it was given
    local: float  # ‖Δ‖ / ‖y‖ over all positions; infinite where y is 0 alone
    added_O: Tensor  # the root mean square of Δ by output unit
    base_O: Tensor  # and of y
    heads: Mapping[str, Tensor]  # `local` (H,) of the units of each head, for roles attn.q, attn.k and attn.v


@dataclass(frozen=True, eq=False)
class Drift:
    """‖x' - x‖ / ‖x‖ of a hidden state, adapted run against base run, over all positions."""

    path: str  # of the module that gives it, or takes it
    layer: int | None
    drift: float
    heads_H: Tensor  # the same by head; empty where it has none


@dataclass(frozen=True, eq=False)
class TokenEffect:
    """What happens at the tokens of each id that the text has."""

    ids_V: Tensor
    counts_V: Tensor
    drift_V: Tensor  # the mean of ‖x' - x‖ / ‖x‖ after the last block
    divergence_V: Tensor | None  # the mean of D(adapter ‖ base) of what is predicted there; None without an LM head


@dataclass(frozen=True, eq=False)
class Effect:
    """What an adapter does on given text; tensors are float32 on the CPU."""

    layers: tuple[LayerEffect, ...]  # adapted ones, in the model's order: see `effect`
    blocks: tuple[Drift, ...]  # the residual stream after each block
    heads: tuple[Drift, ...]  # what attention hands to its output layer (attn.o), with its share by head
    tokens: TokenEffect | None  # None where the input is no token ids

    @property
    def divergence(self) -> float | None:
        """The mean of D(adapter ‖ base) of what is predicted, over all tokens, in nats; None without an LM head."""
        if self.tokens is None or self.tokens.divergence_V is None:
            return None
        counts_V = self.tokens.counts_V.double()
        return float((self.tokens.divergence_V * counts_V).sum() / counts_V.sum())


def effect(model: nn.Module, name: str, batches: Iterable[Mapping[str, Any]]) -> Effect:
    """Run every batch with the base and with an attached adapter, and sum up what differs.

    Layers are the adapted modules that the data reach, but those whose weights are replaced by a module further up, or
    that give more than one tensor (both in full fine-tuning): these are seen in the drift alone.

    Padding (`attention_mask` 0) never counts. The model runs in evaluation mode and is afterwards as it was. Memory:
    the hidden states and predictions of one batch, and two numbers for each output unit. In half precision, what is
    smaller than the rounding of an output (2^-9 of it in bfloat16) is noise.

    Args:
        model: any model whose forward takes the entries of a batch as keywords.
        name: of the adapter.
        batches: mappings of forward's keywords to tensors; read once.

    Raises:
        NoSuchAdapter: no adapter of that name.
        BadState: it puts places of its own into the sequence, or an adapter is merged.
        BadData: no data, data that reach no adapted layer, NaN or infinity.

    >>> import lorakit as lk
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    >>> lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="fresh")
    >>> found = effect(model, "fresh", [{"input_ids": torch.ones(2, 3).long()}])
    >>> found.layers[0].local, found.layers[0].heads["attn.q"].shape, found.divergence
    (0.0, torch.Size([2]), 0.0)
    """
    if any(attached_to(model, name).method.inserts):
        raise BadState(f"{name!r} puts places of its own into every sequence, so its hidden states are not beside the "
                       "base's; compare what both predict (lorakit.analyse.examples)")  # fmt: skip
    listener, tokens = Listener(model, name), _Tokens()
    with ExitStack() as held:
        held.enter_context(mode(model, training=False))
        held.enter_context(torch.no_grad())
        held.enter_context(listener.listening())
        for number, batch in enumerate(batches, 1):
            _run(model, _given(model, batch, number), number, listener, tokens)
    layers = [(path, sums) for path, sums in listener.local.items() if sums.positions]
    if not layers and not any(sums.positions for sums in listener.blocks.values()):
        some = ", ".join(list(listener.local)[:3])
        raise BadData(f"no batch reached a layer that {name!r} adapts ({some}); give one that does")
    heads, sites = _heads(model), [site for site in sites_of(model) if site.role in _QKV]
    return Effect(
        layers=tuple(_layer(path, sums, heads, [site for site in sites if site.path == path]) for path, sums in layers),
        blocks=tuple(_drift(path, sums, 0) for path, sums in listener.blocks.items()),
        heads=tuple(_drift(path, sums, heads["attn.o"]) for path, sums in listener.heads.items()),
        tokens=tokens.effect(),
    )


def _given(model: nn.Module, batch: Any, number: int) -> dict[str, Any]:
    """The batch on the model's device, without a cache that a layer would fill twice."""
    if not isinstance(batch, Mapping):
        raise BadData(f"batch {number} is a {type(batch).__name__}, not a mapping of forward's keywords")
    device = next((parameter.device for parameter in model.parameters()), None)
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return ({"use_cache": False} if "use_cache" in inputs_of(model) else {}) | moved


class _Tokens:
    """Sums by token id."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, 0, dtype=torch.float64)  # how many, their drift, and their divergence
        self.predicts = True  # whether every batch had predictions to compare

    def add(self, ids_N: Tensor, drift_N: Tensor, divergence_N: Tensor | None) -> None:
        """Count the tokens of a batch."""
        ones_N = torch.ones_like(drift_N)
        self.predicts &= divergence_N is not None
        told = (ones_N, drift_N, ones_N if divergence_N is None else divergence_N)
        found = torch.stack([torch.bincount(ids_N, each.double()) for each in told]).cpu()
        longest = max(found.shape[1], self.sums.shape[1])
        self.sums = torch.stack([pad(each, (0, longest - each.shape[1])) for each in (self.sums, found)]).sum(0)

    def effect(self) -> TokenEffect | None:
        ids_V = self.sums[0].nonzero()[:, 0]
        if not len(ids_V):
            return None
        counts_V, drift_V, divergence_V = self.sums[:, ids_V]
        mean_V = (divergence_V / counts_V).float() if self.predicts else None
        return TokenEffect(ids_V, counts_V.long(), (drift_V / counts_V).float(), mean_V)


def _run(model: nn.Module, batch: dict[str, Any], number: int, listener: Listener, tokens: _Tokens) -> None:
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    positions = positions_of(batch, number, 0, labelled_only=False, two_sided=two_sided)
    outputs = listener.run(batch, positions)
    ids_BT = batch.get("decoder_input_ids" if two_sided else "input_ids")
    if ids_BT is None or ids_BT.numel() != len(listener.drift_N):
        return
    kept_N = positions.kept(ids_BT[..., None], "the input")
    kept_N = torch.ones_like(ids_BT, dtype=torch.bool).flatten() if kept_N is None else kept_N
    logits = [getattr(output, "logits", None) for output in outputs] if has_writer(model) else [None]
    told = [each.flatten(0, 1)[kept_N] for each in logits if each is not None]
    tokens.add(ids_BT.flatten()[kept_N], listener.drift_N[kept_N], divergence(*told) if told else None)


def _heads(model: nn.Module) -> dict[str, int]:
    """How many heads share the units of a role out; 0 where the config does not tell."""
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    every = getattr(text, "num_attention_heads", 0)
    keys = getattr(text, "num_key_value_heads", None) or every
    return {"attn.q": every, "attn.k": keys, "attn.v": keys, "attn.o": every}


def _layer(path: str, sums: Sums, heads: Mapping[str, int], sites: Sequence[Site]) -> LayerEffect:
    by_head = {site.role: sums.of(site.slice).by_head(heads[site.role]) for site in sites}
    added_O, base_O = ((each / sums.positions).sqrt().float() for each in (sums.added_O, sums.base_O))
    return LayerEffect(path, layer_of(path), sums.positions, sums.ratio(path), added_O, base_O, by_head)


def _drift(path: str, sums: Sums, heads: int) -> Drift:
    return Drift(path, layer_of(path), sums.ratio(path), sums.by_head(heads))
