"""Prefix-layer tuning (PreLayer): at special tokens, trained vectors stand in for what every block computes.

Hu et al. 2021 (arXiv:2106.09685), section 5.1; with `form="key-value"` prefix-tuning (Li & Liang 2021,
arXiv:2101.00190) without its reparametrisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import layout_of
from lorakit.core.plan import Placement
from lorakit.core.sites import Site, unbatched
from lorakit.core.stack import sites_within
from lorakit.errors import BadMethod
from lorakit.methods._prefix import AtPlaces, PrefixMethod, Vectors, Widths
from lorakit.methods._targeted import Rules, refuse_slice

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

    form: Form = "hidden"  # what is overwritten: hidden (after every block) or key-value (in every attention)

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield "form", self.form, f"one of {get_args(Form)}", self.form in get_args(Form)

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
        sites = sites_within(model, "attn.k", "attn.v")
        blocks, kind = sites_within(model, "block"), type(model).__name__
        if len(sites) != 2 * len(blocks) or any(site.layout is None for site in sites):
            raise BadMethod(f"{kind} has {len(blocks)} blocks but {len(sites)} layers known to make keys or values, so "
                            "prefix-layer cannot overwrite them; take form='hidden'")  # fmt: skip
        for path, why in unbatched(model, [site.path for site in sites]).items():
            raise BadMethod(f"prefix-layer cannot overwrite what {path} makes: {why}; take form='hidden'")
        yield from (self._placement(site, KEYS_VALUES) for site in sites)

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Delta:
        """Room for the vectors of one module."""
        widths, places = cast(Widths, shared), sum(self.inserts)
        if placement.kind == KEYS_VALUES:
            return Vectors(placement, places, _width(placement, module))
        refuse_slice(placement)
        if placement.kind == LAST:
            return LastVectors(placement, places, widths.hidden, self.prefix)
        return Vectors(placement, places, widths.hidden)


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


def _width(placement: Placement, module: nn.Module) -> int:
    layout = layout_of(module)
    if layout is None:
        raise BadMethod(f"{placement.path} is a {type(module).__name__}, whose keys or values cannot be overwritten")
    return placement.slice.width if placement.slice else layout.out_features
