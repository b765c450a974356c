"""Next-token loss of flat lines: no padding, shared contexts once, the head on labelled positions alone.

Legend: T tokens of a line, H hidden width, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorakit.core.attention import flat, flat_inputs
from lorakit.core.packing import Line, divide, pack
from lorakit.kernels.product import round_number, takes
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
    whole = pack(examples, share=share)
    if len(whole.ids_T) <= most:
        return [_portion(whole, len(examples))]
    parts = [[examples[number] for number in part] for part in divide(examples, most, share=share)]
    return [_portion(pack(part, share=share), len(part)) for part in parts]


def _portion(line: Line, examples: int) -> Portion:
    return Portion(line, examples, len(line.targets_N), len(line.ids_T))


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
    """Where products want a round number of tokens, a few that nothing looks at stand at the end."""
    more = round_number(len(line.ids_T)) - len(line.ids_T) if takes(*islice(model.parameters(), 1)) else 0
    ids_T, positions_T = (F.pad(each_T, (0, more)) for each_T in (line.ids_T, line.positions_T))
    inputs = flat_inputs(ids_T, positions_T, line.segments, model.device)
    hidden_TH = model.base_model(**inputs).last_hidden_state[0]
    return hidden_TH.index_select(0, line.predictors_N.to(hidden_TH.device)), line.targets_N.to(hidden_TH.device)


def samples(examples: Sequence[Encoded]) -> list[_Tried]:
    """Some examples, and one that begins like the first and then goes its own way, labelled throughout."""
    first, tried = tuple(examples[0].ids), [tuple(example.ids) for example in examples[:_TRIED]]
    other = (*first[: len(first) * 3 // 4], *reversed(first[len(first) // 4 :]))
    return [_Tried(ids, 1) for ids in (*tried, other[: len(first)])]
