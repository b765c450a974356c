"""What the planner tells of a run: bytes, operations, seconds, and what it chose."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorakit.core.summary import size
from lorakit.train.arithmetic import Flops
from lorakit.train.fitting import Checkpointing, Choice
from lorakit.train.machine import Machine
from lorakit.train.probe import Kept

_ROWS = {  # of the table, and the attributes of `Bytes` that they show
    **{"weights": "weights", "trained numbers": "trained", "gradients": "gradients", "AdamW's moments": "optimiser"},
    **{"between steps": "state", "saved file": "file"},
}


@dataclass(frozen=True)
class Bytes:
    """What training holds from step to step, and what it saves."""

    weights: int
    trained: int  # numbers beside the weights: the adapter, or masters of weights that are of another type
    gradients: int
    optimiser: int  # AdamW's two moments
    file: int  # the tensors of what is saved

    @property
    def state(self) -> int:
        """All that is held from step to step."""
        return self.weights + self.trained + self.gradients + self.optimiser


@dataclass(frozen=True)
class Forecast:
    """What a run takes on a machine, and how it is made to fit; `print` it to see the table."""

    model: str
    method: str
    machine: Machine
    parameters: int  # of the base
    trainable: int
    bytes: Bytes
    every_weight: Bytes  # if all weights were trained in place instead
    kept: Kept  # for backward, with nothing computed twice
    flops: Flops  # of a token
    step_tokens: float
    step_seconds: float  # at least: all arithmetic at the machine's speed in matrix products
    choice: Choice

    @property
    def forward_tokens(self) -> int:
        """The most tokens of one forward pass."""
        return self.choice.forward_tokens

    @property
    def checkpointing(self) -> Checkpointing:
        """Whether blocks keep their inputs alone and are computed again."""
        return self.choice.checkpointing

    @property
    def fits(self) -> bool:
        """Whether one device suffices."""
        return self.choice.devices == 1

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return asdict(self) | {"kept": self.kept._asdict(), "fits": self.fits}

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._memory(), "", *self._work(), "", self.choice.why])

    def _head(self) -> list[str]:
        share = self.trainable / max(self.parameters, 1)
        speed = f"{in_words(self.machine.flops_per_second, 'FLOP/s')} ({self.machine.source})"
        return [
            f"{self.model}, {self.parameters:,} numbers; {self.method} trains {self.trainable:,} ({share:.3%})",
            f"{self.machine.name}: {size(self.machine.memory_bytes)}, {speed}",
        ]

    def _memory(self) -> list[str]:
        mine, whole, choice = self.bytes, self.every_weight, self.choice
        on = "one device" if choice.devices < 2 else f"each of {choice.devices:,} devices"
        read = f"{choice.forward_tokens:,} tokens, checkpointing {choice.checkpointing}"
        rows = [
            ("", self.method, "every weight trained"),
            *((name, size(getattr(mine, field)), size(getattr(whole, field))) for name, field in _ROWS.items()),
            ("kept of a token", size(self.kept.per_token), f"by {self.kept.source}, nothing computed twice"),
            ("kept of a pass", size(choice.activations), read),
            ("gradients, logits", size(choice.working), "at most"),
            ("in all", size(choice.total), f"on {on}"),
        ]
        name_width, wide = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        return [f"{name:<{name_width}}  {one:>{wide}}  {other}" for name, one, other in rows]

    def _work(self) -> list[str]:
        found = {name: in_words(value, "FLOP") for name, value in asdict(self.flops).items()}
        speed = f"{self.step_tokens / self.step_seconds:,.0f} tokens/s at most"
        return [
            f"a token: {found['step']}, forward alone {found['forward']}, every weight trained {found['every_weight']}",
            f"a step of {self.step_tokens:,.0f} tokens: {self.step_seconds:,.3g} s at least, {speed}",
        ]


def in_words(count: float, unit: str) -> str:
    """A large count with its unit.

    >>> in_words(5.48e8, "FLOP")
    '548 MFLOP'
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:,.3g} E{unit}"
