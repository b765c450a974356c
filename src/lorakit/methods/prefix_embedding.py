"""Prefix-embedding tuning (PreEmbed): trained word embeddings of special tokens in the sequence.

Hu et al. 2021 (arXiv:2106.09685), section 5.1; with a prefix alone it is prompt tuning (Lester et al. 2021,
arXiv:2104.08691).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self, cast

from torch import nn

from lorakit.core.delta import Delta
from lorakit.core.method import Tensors
from lorakit.core.named import named_tensors
from lorakit.core.plan import Placement, Plan
from lorakit.core.stack import Reading, embedding_path, stack_of
from lorakit.methods import _peft as peft
from lorakit.methods._prefix import PrefixMethod, Vectors, Widths
from lorakit.methods._targeted import refuse_slice

WORDS: Final = "word vectors"
PROMPT: Final = "prompt_embeddings"  # PEFT's name of the vectors
COUNT: Final = "num_virtual_tokens"  # ... and of their number


@dataclass(frozen=True, kw_only=True)
class PrefixEmbedding(PrefixMethod):
    """The sequence becomes prefix, context, infix, target; the word embeddings of prefix and infix are trained.

    They are (prefix + infix) x d numbers, and begin as word embeddings of random tokens. What callers see keeps the
    length they gave; the model's positions have to hold the longer sequence.

    Example:
        >>> PrefixEmbedding(prefix=64, infix=8).inserts
        (64, 8)

    Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 5.1 (PreEmbed).
    """

    name: ClassVar[str] = "prefix-embedding"
    kinds: ClassVar[tuple[str, ...]] = (WORDS,)

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """The word embeddings that the blocks read."""
        self.refuse_too_many(model)
        return [Placement(embedding_path(model), "embed", WORDS, rank=sum(self.inserts))]

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Vectors:
        """Room for the vectors."""
        refuse_slice(placement)
        return Vectors(placement, sum(self.inserts), cast(Widths, shared).words)

    @classmethod
    def is_in_peft(cls, config: Mapping[str, Any]) -> bool:
        """PEFT's prompt tuning, which is a prefix without an infix."""
        return config.get("peft_type") == "PROMPT_TUNING"

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The prefix of a PEFT folder: PEFT puts it before all tokens, which is ours where a text is read forwards."""
        reading, kind = Reading.of(stack_of(model)), type(model).__name__
        faults = [] if PROMPT in tensors else [f"{PROMPT} is missing"]
        if reading.leading or reading.bidirectional:
            faults.append(f"PEFT reads the prefix of a {kind} otherwise: before its first token, or from its decoder")
        peft.refuse_misfits(config, {COUNT: int}, faults)
        method = cls(prefix=config.get(COUNT, 0), train=tuple(dict.fromkeys(peft.trained(config, tensors))))
        return method, method.plan(model)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy the vectors out of `tensors`, by our name or PEFT's."""
        if PROMPT in tensors:
            tensors |= {name: tensors.pop(PROMPT) for name in named_tensors(deltas)}
        return super().read(deltas, tensors)
