"""The planner: counts what a run is going to take, and chooses how it is made to fit."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lorakit.core.attach import detach, new_deltas, put
from lorakit.core.insertion import longest_insertion
from lorakit.core.method import Method
from lorakit.core.sites import ADAPTERS
from lorakit.core.stack import longest_of
from lorakit.core.state import Attached, attached_to, deltas_of, state_or_new
from lorakit.core.summary import FLOAT, Summary, summary
from lorakit.train.arithmetic import Flops, flops, kept_per_token, shape_of_model
from lorakit.train.feed import Encoded
from lorakit.train.fitting import LEVELS, Need, Wanted, choose
from lorakit.train.forecast import Bytes, Forecast
from lorakit.train.machine import Machine
from lorakit.train.machine import machine as machine_named
from lorakit.train.probe import Kept, probe, skeleton
from lorakit.train.settings import Train, check

_NAME = "forecast"
_TRAINED_LOGITS = 4  # tensors of a chunk of logits that autograd holds


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the examples are, and how much of them is learned.

    Raises:
        LorakitError: lengths below 1, a mean above the longest, or a share that is none.
    """

    mean: float | None = None  # tokens of an average example; None: all are as long as the longest
    longest: int | None = None  # tokens of the longest example; None: as many as max_length lets through
    labelled: float = 1.0  # share of the tokens that are labelled

    def __post_init__(self) -> None:
        lengths = {"mean": self.mean, "longest": self.longest}
        rules = [(name, value, "at least 1", value is None or 1 <= value < math.inf) for name, value in lengths.items()]
        if self.mean and self.longest:
            rules.append(("mean", self.mean, f"at most longest={self.longest}", self.mean <= self.longest))
        check("plan for", [*rules, ("labelled", self.labelled, "above 0, at most 1", 0 < self.labelled <= 1)])

    @staticmethod
    def of(examples: Sequence[Encoded]) -> Lengths:
        """The lengths of encoded examples.

        >>> from types import SimpleNamespace as Example
        >>> Lengths.of([Example(ids=[5, 6, 7, 8], start=2), Example(ids=[5, 6], start=1)])
        Lengths(mean=3.0, longest=4, labelled=0.5)
        """
        lengths = [len(example.ids) for example in examples]
        labelled = max(sum(len(example.ids) - max(example.start, 1) for example in examples), 1)
        return Lengths(mean=sum(lengths) / len(lengths), longest=max(lengths), labelled=labelled / sum(lengths))

    def within(self, most: int) -> tuple[float, int]:
        """Mean and longest of examples that are cut to so many tokens."""
        longest = min(self.longest or most, most)
        return min(self.mean or longest, longest), longest


def plan(
    model: Any, method: Method, settings: Train, tokens: Lengths, machine: Machine, *, trained_bytes: int = FLOAT
) -> Forecast:
    """Forecast a run, and choose the largest passes and the least checkpointing that fit.

    The model is not changed and may be on the meta device, so its weights need not be there at all. Adapter, gradients
    and AdamW are counted number by number, and what autograd keeps on a copy without values, or by a formula where the
    model cannot be run so. What data decide (ranks shared out by calibration) is taken as the method tells it.

    Args:
        model: a transformers model, its weights of the type that they have in training.
        method: how it is adapted.
        settings: batch size, accumulation, the longest example, and the most tokens of a pass (longer ones are of no
            use, shorter ones are chosen where these do not fit); checkpointing is chosen unless it is asked for.
        tokens: how long the examples are.
        machine: where it is to run, with the memory that is free before the model is loaded.
        trained_bytes: of a trained number, its gradient, each moment, and its place in the file; lorakit's take 4.

    Raises:
        NoSuchTarget, BadMethod: the method does not fit the model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
        >>> method = Method.from_json({"name": "lora", "rank": 4, "targets": ["attn.q", "attn.v"]})
        >>> cpu = Machine("cpu", "cpu", 10**9, 1e11, "told")
        >>> found = plan(model, method, Train(batch_size=4), Lengths(longest=64), cpu)
        >>> found.trainable, found.forward_tokens, found.checkpointing
        (512, 256, 'none')
    """
    bare = skeleton(model)
    record = _attached(bare, method)
    positions = longest_of(bare) or sys.maxsize
    mean, longest = tokens.within(min(settings.max_length, positions - longest_insertion(bare)))
    longer = 1 + sum(method.inserts) / mean  # places for each token
    shape, deltas, told = shape_of_model(bare, record.plan), deltas_of(bare, _NAME), summary(bare)
    work = flops(shape, deltas, mean * longer, tokens.labelled, replaces=method.replaces_weights).times(longer)
    kept = probe(bare, round(mean), machine.device) or Kept(kept_per_token(bare, record.plan) * longer, 0)
    own = _bytes(bare, told, trained_bytes)
    loss = tokens.labelled, _logit_bytes(bare)
    need = Need(own.state, _whole(bare, shape.blocks), kept, shape, model.dtype.itemsize, *loss)
    choice = choose(need, _wanted(settings, longest, machine, work))
    operations = work.step + (work.recomputed if choice.checkpointing == "blocks" else 0)
    step_tokens = settings.batch_size * settings.accumulate * mean
    return Forecast(
        model=type(model).__name__,
        method=method.name,
        machine=machine,
        parameters=told.base_parameters,
        trainable=own.gradients // trained_bytes,
        bytes=own,
        every_weight=_every_weight(told.base_parameters, model.dtype.itemsize, trained_bytes),
        kept=kept,
        flops=work,
        step_tokens=step_tokens,
        step_seconds=step_tokens * operations / machine.flops_per_second / max(choice.devices, 1),
        choice=choice,
    )


def plan_attached(model: Any, name: str, examples: Sequence[Encoded], settings: Train) -> Forecast:
    """Forecast the training of an attached adapter on the machine at hand, which may hold the base already.

    Processes that `torchrun` started on one machine share its RAM; each has a GPU of its own.
    """
    found = machine_named(None, model.dtype)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if found.device == "cpu" else 1
    held = summary(model).base_bytes if model.device.type == found.device else 0
    room = replace(found, memory_bytes=found.memory_bytes // sharing + held)
    return plan(model, attached_to(model, name).method, settings, Lengths.of(examples), room)


def _attached(bare: Any, method: Method) -> Attached:
    """Attach a method alone to a skeleton: its deltas get shapes, and no first values."""
    for name in tuple(state_or_new(bare).attached):
        detach(bare, name)
    resolved = method.plan(bare)
    method.check(resolved, bare)
    record = Attached(method, resolved, trainable=True)
    put(bare, _NAME, record, new_deltas(bare, method, resolved), active=True)
    return record


def _wanted(settings: Train, longest: int, machine: Machine, work: Flops) -> Wanted:
    batch = settings.batch_size * longest
    most = min(batch, max(settings.forward_tokens, longest))
    levels = LEVELS if settings.checkpointing == "none" else LEVELS[1:]
    return Wanted(longest, most, batch, machine.memory_bytes, work.recomputed / work.step, levels)


def _bytes(bare: Any, told: Summary, trained_bytes: int) -> Bytes:
    own = {id(value): value for delta in deltas_of(bare, _NAME) for value in (*delta.parameters(), *delta.buffers())}
    trained = [value.numel() for value in own.values() if value.requires_grad]
    numbers = sum(trained)
    return Bytes(
        weights=sum(value.nbytes for _, value in _base(bare)),
        trained=numbers * trained_bytes + sum(value.nbytes for value in own.values() if not value.requires_grad),
        gradients=numbers * trained_bytes,
        optimiser=2 * numbers * trained_bytes + len(trained) * FLOAT,  # and a count of steps for each tensor
        file=next(adapter.stored for adapter in told.adapters if adapter.name == _NAME) * trained_bytes,
    )


def _every_weight(numbers: int, itemsize: int, trained_bytes: int) -> Bytes:
    """All weights trained in place, or beside the model as masters of another type."""
    weights, trained = numbers * itemsize, numbers * trained_bytes
    return Bytes(weights, 0 if itemsize == trained_bytes else trained, trained, 2 * trained, weights)


def _base(bare: Any) -> list[tuple[str, Tensor]]:
    """The base's own parameters and buffers."""
    every = (*bare.named_parameters(), *bare.named_buffers())
    return [(path, value) for path, value in every if ADAPTERS not in path.split(".")]


def _whole(bare: Any, blocks: Sequence[str]) -> int:
    """Bytes that a device holds whole where the base is shared out: what is outside of blocks, and two of these."""
    sizes: Counter[str] = Counter()
    for path, value in _base(bare):
        sizes[next((block for block in blocks if path.startswith(f"{block}.")), "")] += value.nbytes
    return sizes.pop("", 0) + 2 * max(sizes.values(), default=0)


def _logit_bytes(bare: Any) -> int:
    """Bytes of a logit in all tensors of a chunk: float32 and, where the model is not, two in its own type.

    Autograd holds several of a head that is adapted; a frozen one has its gradient made in the same memory.
    """
    head, size = bare.get_output_embeddings(), bare.dtype.itemsize
    one = FLOAT if size >= FLOAT else FLOAT + 2 * size
    return _TRAINED_LOGITS * one if head is not None and ADAPTERS in head._modules else one
