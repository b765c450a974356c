"""Attention inside a flattened batch: each segment attends to the segments it follows, and to itself, causally.

Segments lie one after another in one line of tokens, without padding. A segment that goes on from others (a target from
its context) sees all their tokens, so what several segments begin with alike is there once.

Legend: T tokens of the line, S segments of a piece, Q queries and K keys of each (padded), H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.short_attention import fits, short_attention

_CPU = torch.device("cpu")
_LEAST_FILLED = 0.7  # a piece takes segments of at least this share of its longest


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of the line, and the (start, stop) of those before them that they see, in order."""

    start: int
    stop: int
    sees: tuple[tuple[int, int], ...] = ()

    @property
    def queries(self) -> int:
        """How many tokens it has."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """How many tokens its last token sees."""
        return self.queries + sum(stop - start for start, stop in self.sees)

    def places(self) -> list[int]:
        """All that its last token sees, in order."""
        runs = (*self.sees, (self.start, self.stop))
        return [place for start, stop in runs for place in range(start, stop)]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Segments of about one length, which attend in one call."""

    segments: int
    queries: int
    keys: int
    own: Tensor | slice  # places of the queries (S Q): a slice where they lie one after another
    seen: Tensor | slice  # places of the keys (S K)
    mask_SQK: Tensor  # added to the scores: -inf where nothing is seen; one for all segments that see themselves alone

    @property
    def is_causal(self) -> bool:
        """Whether each segment sees itself alone."""
        return len(self.mask_SQK) == 1 and self.queries == self.keys

    def to(self, device: torch.device) -> _Piece:
        own, seen = (place if isinstance(place, slice) else place.to(device) for place in (self.own, self.seen))
        return _Piece(self.segments, self.queries, self.keys, own, seen, self.mask_SQK.to(device))


@dataclass(frozen=True, eq=False)
class Segments:
    """How one line of tokens is divided; made once a batch, used by every layer.

    Example:
        >>> context, first, second = Segment(0, 3), Segment(3, 5, ((0, 3),)), Segment(5, 9, ((0, 3),))
        >>> Segments([context, first, second]).longest
        7
    """

    segments: Sequence[Segment]
    device: torch.device = _CPU

    @property
    def longest(self) -> int:
        """The most tokens that one token sees."""
        return max(segment.keys for segment in self.segments)

    def to(self, device: torch.device) -> Segments:
        """The same on another device."""
        return self if device == self.device else Segments(self.segments, device)

    @cached_property
    def pieces(self) -> list[_Piece]:
        """Segments of about one length together, for calls with padding of their own."""
        return [_piece(part).to(self.device) for part in _alike(self.segments)]

    @cached_property
    def back(self) -> Tensor | None:
        """For each token (T), where its output is among those of all pieces; None: where it was."""
        if len(self.pieces) == 1 and isinstance(self.pieces[0].own, slice):
            return None
        back_T = torch.empty(max(segment.stop for segment in self.segments), dtype=torch.long)
        offset = 0
        for part, piece in zip(_alike(self.segments), self.pieces, strict=True):
            for number, segment in enumerate(part):
                begin = offset + number * piece.queries
                back_T[segment.start : segment.stop] = torch.arange(begin, begin + segment.queries)
            offset += piece.segments * piece.queries
        return back_T.to(self.device)

    @cached_property
    def seen(self) -> Tensor | None:
        """The places of all keys of all segments, one after another (K); None: each segment sees itself alone."""
        if not any(segment.sees for segment in self.segments):
            return None
        return torch.tensor([place for segment in self.segments for place in segment.places()], device=self.device)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where each segment's queries and keys begin, and where the last ones end (int32)."""
        counts = [[segment.queries for segment in self.segments], [segment.keys for segment in self.segments]]
        begins = torch.tensor([[0, 0], *zip(*counts, strict=True)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return begins[:, 0].to(self.device), begins[:, 1].contiguous().to(self.device)


def segment_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(scale q kᵀ) v inside each segment and over what it sees; grouped key heads as in SDPA.

    On a CPU segments of about one length go together, through SDPA or, where they are short, through batched products.
    On CUDA `torch.nn.attention.varlen` reads the line as it is, where it knows the dtype (float16, bfloat16) and no
    dropout is asked for. Tokens after the last segment get zeros.

    Args:
        q_THD: queries (T, heads, width).
        k_THD: keys (T, key heads, width).
        v_THD: values, likewise.
        segments: how the line is divided.
        scale: None for 1 / sqrt(width).
        dropout: share of the attention that is dropped.

    Example:
        >>> q, k, v = torch.randn(3, 5, 2, 4)
        >>> apart = segment_attention(q, k, v, Segments([Segment(0, 2), Segment(2, 5)]))
        >>> torch.allclose(apart[:2], segment_attention(q[:2], k[:2], v[:2], Segments([Segment(0, 2)])), atol=1e-6)
        True
    """
    segments = segments.to(q_THD.device)
    if q_THD.is_cuda and not dropout and q_THD.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q_THD, k_THD, v_THD, segments, scale)
    outputs = [_attend(piece, q_THD, k_THD, v_THD, scale, dropout) for piece in segments.pieces]
    if segments.back is not None:
        outputs = [torch.cat(outputs).index_select(0, segments.back)]
    rest = len(q_THD) - len(outputs[0])
    return F.pad(outputs[0], (0, 0, 0, 0, 0, rest)) if rest else outputs[0]


def _attend(piece: _Piece, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    q_SHQD, k_SHKD, v_SHKD = (
        _taken(x, where).view(piece.segments, length, *x.shape[1:]).transpose(1, 2)
        for x, where, length in (
            (q, piece.own, piece.queries),
            (k, piece.seen, piece.keys),
            (v, piece.seen, piece.keys),
        )
    )
    if fits(q, piece.keys, dropout):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out_SHQD = short_attention(q_SHQD, k_SHKD, v_SHKD, piece.mask_SQK, scale)
    else:
        mask = None if piece.is_causal else piece.mask_SQK[:, None].to(q.dtype)
        how = {"is_causal": piece.is_causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        out_SHQD = F.scaled_dot_product_attention(q_SHQD, k_SHKD, v_SHKD, mask, dropout, **how)  # type: ignore[arg-type]
    return out_SHQD.transpose(1, 2).reshape(-1, *out_SHQD.shape[1::2])


def _taken(x: Tensor, where: Tensor | slice) -> Tensor:
    if not isinstance(where, slice):
        return x.index_select(0, where)
    return x if where == slice(0, len(x)) else x[where]


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if segments.seen is not None:
        k, v = k.index_select(0, segments.seen), v.index_select(0, segments.seen)
    longest_query = max(segment.queries for segment in segments.segments)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bounds = *segments.bounds, longest_query, segments.longest
    found = varlen_attn(q, k, v, *bounds, scale=scale, window_size=(-1, 0))
    return found[0] if isinstance(found, tuple) else found


def _alike(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Segments in parts of about one length, in their order; those that see others apart from those that do not."""
    parts: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (bool(s.sees), -s.keys, -s.queries)):
        first = parts[-1][0] if parts else None
        if first is None or bool(first.sees) != bool(segment.sees) or not _fits(segment, first):
            parts.append([])
        parts[-1].append(segment)
    return [sorted(part, key=lambda segment: segment.start) for part in parts]


def _fits(segment: Segment, longest: Segment) -> bool:
    return segment.keys >= _LEAST_FILLED * longest.keys


def _piece(part: Sequence[Segment]) -> _Piece:
    queries, keys = max(s.queries for s in part), max(s.keys for s in part)
    in_a_row = all(s.queries == queries and not s.sees for s in part)
    in_a_row = in_a_row and all(b.start == a.stop for a, b in pairwise(part))
    if in_a_row:
        run = slice(part[0].start, part[-1].stop)
        return _Piece(len(part), queries, keys, run, run, _mask(part, queries, keys))
    own = torch.tensor([_padded(list(range(s.start, s.stop)), queries) for s in part]).flatten()
    seen = torch.tensor([_padded(s.places(), keys) for s in part]).flatten()
    return _Piece(len(part), queries, keys, own, seen, _mask(part, queries, keys))


def _padded(places: list[int], length: int) -> list[int]:
    return places + [places[-1]] * (length - len(places))


def _mask(part: Sequence[Segment], queries: int, keys: int) -> Tensor:
    """Query i sees keys up to i + (its keys − its queries), and so never the padding: 0 there, -inf beyond."""
    before_S = torch.tensor([s.keys - s.queries for s in part]) if any(s.sees for s in part) else torch.tensor([0])
    last_SQ = before_S[:, None] + torch.arange(queries)
    return torch.where(torch.arange(keys) <= last_SQ[:, :, None], 0.0, float("-inf"))
