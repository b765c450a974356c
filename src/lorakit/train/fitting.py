"""How a run is made to fit into memory: tokens of a pass, checkpointing, and devices that share the base."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from lorakit.core.summary import size
from lorakit.kernels.cross_entropy import CHUNK_ROWS
from lorakit.train.arithmetic import Shape
from lorakit.train.probe import Kept

Checkpointing = Literal["none", "blocks"]
LEVELS: Final[tuple[Checkpointing, ...]] = ("none", "blocks")  # the cheapest first
SHARE = 0.9  # of the memory that a run may fill; allocators and libraries want the rest
WORTHWHILE = 512  # tokens: a pass over fewer may take longer to read the weights than to compute
_GRADIENTS = 4  # tensors of the widest layer's size that backward holds at once


@dataclass(frozen=True)
class Need:
    """What a run needs, as a function of the tokens of a pass."""

    state: int  # bytes held from step to step
    whole: int  # bytes of weights that each device holds at once where the state is shared out
    kept: Kept
    shape: Shape
    itemsize: int  # bytes of a number of the hidden states
    labelled: float  # share of the tokens
    logit_bytes: int  # of one logit, in all the tensors that the loss makes of a chunk

    def activations(self, tokens: int, level: Checkpointing) -> float:
        """Bytes kept for backward from the beginning on: everything, or the inputs of blocks."""
        inputs = tokens * len(self.shape.blocks) * self.shape.hidden * self.itemsize
        return self._everything(tokens) if level == "none" else min(inputs, self._everything(tokens))

    def working(self, tokens: int, level: Checkpointing) -> float:
        """Bytes beside them at most: a chunk of logits, then gradients (and what one block keeps)."""
        predicted = self.labelled * tokens
        chunk = min(CHUNK_ROWS, math.ceil(predicted)) * self.shape.vocabulary * self.logit_bytes
        logits = chunk + 2 * predicted * self.shape.hidden * self.itemsize  # hidden states picked, and their gradient
        block = self._everything(tokens) / max(len(self.shape.blocks), 1) if level == "blocks" else 0
        return max(logits, block + _GRADIENTS * tokens * self.shape.widest * self.itemsize)

    def total(self, tokens: int, level: Checkpointing, devices: int = 1) -> float:
        """All bytes of one of so many devices."""
        shared = self.state / devices + (self.whole if devices > 1 else 0)
        return shared + self.activations(tokens, level) + self.working(tokens, level)

    def _everything(self, tokens: int) -> float:
        return self.kept.fixed + tokens * self.kept.per_token


class Wanted(NamedTuple):
    """What a run asks for."""

    least_tokens: int  # the longest example has to go through in one pass
    most_tokens: int  # of a pass
    batch_tokens: int
    memory_bytes: int
    recomputed: float  # share of a step's arithmetic that checkpointing adds
    levels: tuple[Checkpointing, ...] = LEVELS  # to choose from

    @property
    def room(self) -> float:
        """Bytes to fill."""
        return SHARE * self.memory_bytes


@dataclass(frozen=True)
class Choice:
    """How a run is made to fit: the first two are fields of `Train`.

    `activations` are the bytes kept for backward, `working` those of gradients and logits beside them at most, `total`
    all bytes of one device.
    """

    forward_tokens: int
    checkpointing: Checkpointing
    devices: int  # that have to share the base; 0: no number of them suffices
    activations: float
    working: float
    total: float
    why: str


def choose(need: Need, wanted: Wanted) -> Choice:
    """The largest passes, and checkpointing only where they would be small without; on one device if it can be.

    Where one does not suffice, as few as can hold the base together.
    """
    devices = 1 if _largest(need, wanted.levels[-1], wanted, 1) else _fewest(need, wanted)
    found = {level: _largest(need, level, wanted, max(devices, 1)) for level in wanted.levels}
    level = next((each for each in wanted.levels if _is_enough(found, each, wanted)), wanted.levels[-1])
    tokens = found[level] or wanted.least_tokens
    return Choice(
        forward_tokens=tokens,
        checkpointing=level,
        devices=devices,
        activations=need.activations(tokens, level),
        working=need.working(tokens, level),
        total=need.total(tokens, level, max(devices, 1)),
        why=" ".join((*_why_passes(found, level, wanted), _why_devices(need, wanted, devices))),
    )


def _is_enough(found: Mapping[Checkpointing, int], level: Checkpointing, wanted: Wanted) -> bool:
    """Whether passes at this level are large enough, or at no other larger."""
    enough = min(wanted.most_tokens, max(wanted.least_tokens, WORTHWHILE))
    return found[level] >= min(enough, max(found.values())) > 0


def _largest(need: Need, level: Checkpointing, wanted: Wanted, devices: int) -> int:
    """The most tokens of a pass that fit; 0 if not even the longest example does."""
    passes = range(wanted.least_tokens, wanted.most_tokens + 1)
    fitting = bisect_right(passes, wanted.room, key=lambda tokens: need.total(tokens, level, devices))
    return passes[fitting - 1] if fitting else 0


def _fewest(need: Need, wanted: Wanted) -> int:
    """How many devices it takes, at least two; 0 if no number suffices."""
    left = wanted.room - min(need.total(wanted.least_tokens, level, 2) for level in wanted.levels) + need.state / 2
    return max(math.ceil(need.state / left), 2) if left > 0 else 0


def _why_passes(found: Mapping[Checkpointing, int], level: Checkpointing, wanted: Wanted) -> Iterator[str]:
    cost, tokens, whole = f"{wanted.recomputed:.0%} more arithmetic", found[level], found.get("none")
    if not tokens:
        return
    if whole is None:
        yield f"Blocks are computed again for backward, as asked, at {cost}."
    elif level == "blocks":
        few = f"only {whole:,} tokens" if whole else f"not even an example of {wanted.least_tokens:,} tokens"
        yield f"Blocks are computed again for backward, at {cost}: kept whole, {few} would go through in a pass."
    else:
        yield f"Nothing is computed twice, which would cost {cost}."
    if tokens >= wanted.batch_tokens:
        yield f"A whole batch of up to {wanted.batch_tokens:,} tokens goes through in one pass."
    else:
        limit = "as many as asked" if tokens == wanted.most_tokens else "no more fit"
        divided = f"{wanted.batch_tokens:,} is divided into {math.ceil(wanted.batch_tokens / tokens)}"
        yield f"A pass has {tokens:,} tokens ({limit}), so a batch of up to {divided}, which costs next to nothing."


def _why_devices(need: Need, wanted: Wanted, devices: int) -> str:
    room = f"{size(wanted.room)} ({SHARE:.0%} of {size(wanted.memory_bytes)})"
    least = size(min(need.total(wanted.least_tokens, level) for level in wanted.levels))
    if devices == 1:
        return f"One device suffices, within {room}; several divide the batches among copies of the base (DDP)."
    if devices:
        return (f"One device does not suffice: at least {least} are needed, and {room} may be filled. Share the base "
                f"out over {devices:,} devices or more (FSDP2).")  # fmt: skip
    return (f"It does not fit on any number of devices: an example of {wanted.least_tokens:,} tokens and the blocks "
            f"that it goes through take more than {room}; lower max_length, or take larger devices.")  # fmt: skip
