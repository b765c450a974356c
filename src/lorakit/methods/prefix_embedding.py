"""Prefix-embedding tuning (PreEmbed): trained word embeddings of special tokens in the sequence.

Hu et al. 2021 (arXiv:2106.09685), section 5.1; with a prefix alone it is prompt tuning (Lester et al. 2021,
arXiv:2104.08691).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

from torch import nn

from lorakit.core.plan import Placement
from lorakit.core.stack import embedding_path
from lorakit.methods._prefix import Known, PrefixMethod, Vectors
from lorakit.methods._targeted import refuse_slice

WORDS: Final = "word vectors"


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
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """The word embeddings that the blocks read."""
        self.refuse_too_many(model)
        return [Placement(embedding_path(model), "embed", WORDS, rank=sum(self.inserts))]

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Vectors:
        """Room for the vectors."""
        refuse_slice(placement)
        known = cast(Known, shared)
        return Vectors(placement, sum(self.inserts), known.words, known)

    def shape_in_peft(self, vectors: Sequence[Vectors]) -> dict[str, Any]:
        """As wide as word embeddings."""
        known = vectors[0].known
        return {"token_dim": known.words, "num_attention_heads": known.heads, "prompt_tuning_init": "RANDOM"}
