"""Next-token loss of flat lines: no padding, shared contexts once, the head on labelled positions alone.

Legend: T tokens of a line, H hidden width, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit.core.attention import flat, flat_inputs
from lorakit.core.packing import Line, divide, pack
from lorakit.train.feed import Encoded
from lorakit.train.head import backward_from
from lorakit.train.portions import Portion

_TRIED = 2  # examples that a model is tried on


@dataclass(frozen=True, slots=True)
class _Tried:
    ids: tuple[int, ...]
    start: int
    label: int | None = None


def portions(examples: Sequence[Encoded], most: int, *, share: bool) -> list[Portion]:
    """Lines of at most `most` tokens; a longer example has one for itself."""
    parts = [list(range(len(examples)))] if _length(examples) <= most else divide(examples, most)
    lines = [line([examples[number] for number in part], share=share) for part in parts]
    told = zip(lines, parts, strict=True)
    return [Portion(each, len(part), len(each.targets_N), len(each.ids_T)) for each, part in told]


def line(examples: Sequence[Any], *, share: bool) -> Line:
    """One line of these examples."""
    return pack(examples, share=share)


def backward(model: Any, portion: Portion, total: float, *, smoothing: float = 0.0) -> float:
    """Add the gradients of the line's summed loss / total; gives the sum."""
    with flat(model):  # until backward is done: a checkpoint recomputes layers then
        hidden_NH, targets_N = _hidden(model, portion.inputs)
        return backward_from(model, hidden_NH, targets_N, total, smoothing)


def hidden(model: Any, line: Line) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a label (N, H), and the labels (N)."""
    with flat(model):
        return _hidden(model, line)


def _hidden(model: Any, line: Line) -> tuple[Tensor, Tensor]:
    inputs = flat_inputs(line.ids_T, line.positions_T, line.segments, model.device)
    hidden_TH = model.base_model(**inputs).last_hidden_state[0]
    return hidden_TH.index_select(0, line.predictors_N.to(hidden_TH.device)), line.targets_N.to(hidden_TH.device)


def samples(examples: Sequence[Encoded]) -> list[_Tried]:
    """Some examples, and one that begins like the first and then goes its own way, labelled throughout."""
    first, tried = tuple(examples[0].ids), [tuple(example.ids) for example in examples[:_TRIED]]
    other = (*first[: len(first) * 3 // 4], *reversed(first[len(first) // 4 :]))
    return [_Tried(ids, 1) for ids in (*tried, other[: len(first)])]


def _length(examples: Sequence[Encoded]) -> int:
    return sum(len(example.ids) for example in examples)
