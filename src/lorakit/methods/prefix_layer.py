"""Prefix-layer tuning (PreLayer): at special tokens, trained vectors stand in for what every block computes.

Hu et al. 2021 (arXiv:2106.09685), section 5.1; with `form="key-value"` prefix-tuning (Li & Liang 2021,
arXiv:2101.00190) without its reparametrisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, Final, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import layout_of
from lorakit.core.plan import Placement
from lorakit.core.sites import Site, modules_of, unbatched
from lorakit.core.stack import embedding_path, sites_within, stack_of
from lorakit.errors import BadMethod
from lorakit.methods._prefix import AtPlaces, Known, PrefixMethod, Vectors
from lorakit.methods._targeted import refuse_slice

Form = Literal["hidden", "key-value"]
HIDDEN: Final = "hidden states"
LAST: Final = "last hidden states"
KEYS_VALUES: Final = "keys or values"


@dataclass(frozen=True, kw_only=True)
class PrefixLayer(PrefixMethod):
    """The sequence becomes prefix, context, infix, target; at prefix and infix, trained vectors overwrite activations.

    `form="hidden"` (the paper's) overwrites the hidden states after every block: L (prefix + infix) d numbers.
    `form="key-value"` overwrites keys and values in every attention: 2 L (prefix + infix) d_kv numbers. Either begins
    as what the model makes of random tokens. The word embedding at these places is that of some fixed token; combined
    with prefix-embedding, which shares the places, it is trained, too.

    Example:
        >>> PrefixLayer(prefix=8, infix=8).form
        'hidden'

    Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 5.1 (PreLayer); keys and values: Li & Liang 2021,
    https://arxiv.org/abs/2101.00190.
    """

    name: ClassVar[str] = "prefix-layer"
    kinds: ClassVar[tuple[str, ...]] = (HIDDEN, LAST, KEYS_VALUES)
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    form: Form = "hidden"  # what is overwritten: hidden (after every block) or key-value (in every attention)

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """Every block, or every layer that makes keys or values."""
        self.refuse_too_many(model)
        return [*(self._blocks(model) if self.form == "hidden" else self._keys_values(model))]

    def _placement(self, site: Site, kind: str) -> Placement:
        return Placement(site.path, site.role, kind, site.slice, rank=sum(self.inserts))

    def _blocks(self, model: nn.Module) -> Iterator[Placement]:
        *blocks, last = sites_within(model, "block")
        if not blocks:
            raise BadMethod(f"{type(model).__name__} has one block, and no vector after the last one is read; take "
                            "form='key-value'")  # fmt: skip
        yield from (self._placement(block, HIDDEN) for block in blocks)
        yield self._placement(last, LAST)

    def _keys_values(self, model: nn.Module) -> Iterator[Placement]:
        keys, values = sites_within(model, "attn.k"), sites_within(model, "attn.v")
        sites = [site for pair in zip_longest(keys, values) for site in pair if site]  # the order of PEFT's, too
        blocks, kind = sites_within(model, "block"), type(model).__name__
        if not len(keys) == len(values) == len(blocks) or any(site.layout is None for site in sites):
            raise BadMethod(f"{kind} has {len(blocks)} blocks but {len(sites)} layers known to make keys or values, so "
                            "prefix-layer cannot overwrite them; take form='hidden'")  # fmt: skip
        for path, why in unbatched(model, [site.path for site in sites]).items():
            raise BadMethod(f"prefix-layer cannot overwrite what {path} makes: {why}; take form='hidden'")
        yield from (self._placement(site, KEYS_VALUES) for site in sites)

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Delta:
        """Room for the vectors of one module."""
        known, places = cast(Known, shared), sum(self.inserts)
        if placement.kind == KEYS_VALUES:
            return Vectors(placement, places, _width(placement, module), known)
        refuse_slice(placement)
        if placement.kind == LAST:
            return LastVectors(placement, places, known.hidden, self.prefix)
        return Vectors(placement, places, known.hidden, known)

    @classmethod
    def differs_in_peft(cls, model: nn.Module) -> str:
        """Also where attention rotates or norms keys: PEFT's are put behind that, ours before."""
        why, kind = super().differs_in_peft(model), type(model).__name__
        if why or _keys_stay(model):
            return why
        return (
            f"PEFT's keys are those that attention reads and ours those that key layers give, between which a {kind} "
            "may rotate or norm them (they are known to be the same only where positions come from a table)"
        )

    @classmethod
    def of_prompt(cls, places: int, train: tuple[str, ...]) -> Self:
        """PEFT's prefix tuning."""
        return cls(prefix=places, form="key-value", train=train)

    def shape_in_peft(self, vectors: Sequence[Vectors]) -> dict[str, Any]:
        """Keys and values of each block side by side, as heads of one width."""
        known, (width, *others) = vectors[0].known, {each.vectors.shape[1] for each in vectors}
        if self.form != "key-value" or others or width % known.head_width:
            return {}
        return {
            "token_dim": width,
            "num_attention_heads": width // known.head_width,
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }


class LastVectors(AtPlaces):
    """The vectors after the last block, which nothing reads: the places are taken out of the sequence there.

    They count, since the paper's formula has them, but their gradient is zero. What the block itself makes of an infix
    stays, since the target's first token is predicted from the last place of it.
    """

    def __init__(self, placement: Placement, places: int, width: int, prefix: int) -> None:
        super().__init__(placement, None)
        self.unread = nn.Parameter(torch.zeros(places, width))
        self.prefix = prefix

    def written(self, index_BL: Tensor, y: Tensor) -> Tensor:
        vectors_BLD = F.embedding(index_BL.clamp(min=0), self.unread.to(y.dtype))
        return torch.where(index_BL[:, :, None] < self.prefix, vectors_BLD, y)


def _keys_stay(model: nn.Module) -> bool:
    """Whether attention reads keys as their layers give them: positions come from a table, and nothing rotates."""
    stack, words = stack_of(model), model.get_submodule(embedding_path(model))
    tables = [child for child in stack.children() if isinstance(child, nn.Embedding) and child is not words]
    return bool(tables) and not any("rotary" in path for path, _ in modules_of(stack))


def _width(placement: Placement, module: nn.Module) -> int:
    layout = layout_of(module)
    if layout is None:
        raise BadMethod(f"{placement.path} is a {type(module).__name__}, whose keys or values cannot be overwritten")
    return placement.slice.width if placement.slice else layout.out_features
