"""Lines of examples: every prefix once, nothing lost, and who sees whom."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from lorakit.core.packing import divide, pack
from lorakit.kernels import short_attention
from lorakit.kernels.segments import Segment, Segments, segment_attention


@dataclass(frozen=True)
class Pair:
    ids: tuple[int, ...]
    start: int


def drawn(seed: int, contexts: int = 3, targets: int = 4, longest: int = 40) -> list[Pair]:
    """Pairs of a few contexts in any order, some of one token, some equal, some the beginning of another."""
    chance = random.Random(seed)
    found = []
    for _ in range(contexts):
        context = tuple(chance.randrange(9) for _ in range(chance.randrange(1, longest)))
        for _ in range(targets):
            target = tuple(chance.randrange(9) for _ in range(chance.randrange(1, 9)))
            found.append(Pair(context + target, len(context)))
    found += [found[0], Pair(found[0].ids[:-1], max(found[0].start - 1, 1)), Pair((3, 4), 1)]
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_every_label_is_predicted_from_the_whole_of_what_stands_before_it(seed: int, share: bool) -> None:
    pairs = drawn(seed)
    line = pack(pairs, share=share)
    seen = {}
    for s in line.segments.segments:
        seen |= {place: s.places()[: s.keys - s.stop + place + 1] for place in range(s.start, s.stop)}
    wanted = [(pair.ids[:at], pair.ids[at]) for pair in pairs for at in range(pair.start, len(pair.ids))]
    found = []
    for place, target in zip(line.predictors_N.tolist(), line.targets_N.tolist(), strict=True):
        found.append((tuple(line.ids_T[seen[place]].tolist()), target))
        assert line.positions_T[seen[place]].tolist() == list(range(len(seen[place])))
    assert found == wanted


@pytest.mark.parametrize("seed", range(4))
def test_what_examples_begin_with_alike_stands_once(seed: int) -> None:
    context = tuple(range(100, 160))
    pairs = [Pair((*context, seed, number), 60) for number in range(5)]
    line = pack(pairs)
    assert len(line.ids_T) == 61  # the first token of the targets is alike, too
    assert len(pack(pairs, share=False).ids_T) == 5 * 61


def test_a_system_prompt_and_its_contexts_are_a_tree() -> None:
    system, contexts = tuple(range(50)), [tuple(range(100, 130)), tuple(range(200, 230))]
    pairs = [Pair((*system, *context, answer, 7), 80) for context in contexts for answer in (1, 2, 3)]
    line = pack(pairs)
    assert len(line.ids_T) == 50 + 2 * 30 + 6
    assert max(len(segment.sees) for segment in line.segments.segments) == 2


def test_few_tokens_alike_are_not_worth_a_segment() -> None:
    line = pack([Pair((1, 2, number, 5), 2) for number in range(3)])
    assert not any(segment.sees for segment in line.segments.segments)


@pytest.mark.parametrize("most", [1, 10, 30, 10_000])
def test_parts_hold_every_example_once_and_no_more_than_they_may(most: int) -> None:
    pairs = drawn(0)
    parts = divide(pairs, most)
    assert sorted(number for part in parts for number in part) == list(range(len(pairs)))
    assert all(len(part) == 1 or len(pack([pairs[number] for number in part]).ids_T) <= most for part in parts)


def test_a_shared_prompt_is_counted_once_where_a_batch_is_divided() -> None:
    prompt = tuple(range(900))
    pairs = [Pair((*prompt, 1000 + number, *range(40)), 901) for number in range(16)]
    assert len(pack(pairs).ids_T) == 900 + 16 * 40
    assert [len(part) for part in divide(pairs, 1700)] == [14, 2]  # each may share up to 15 tokens less
    assert len(divide(pairs, 1700, share=False)) == 16


def test_prefixes_of_prefixes_without_end() -> None:
    turns = [Pair(tuple(range(number)), 1) for number in range(1, 700)]
    line = pack(turns)
    assert len(line.targets_N) == sum(len(turn.ids) - 1 for turn in turns)


@pytest.mark.parametrize("longest", [0, 160])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("seed", range(6))
def test_segments_attend_as_they_would_alone(
    seed: int, heads: tuple[int, int], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_attention, "LONGEST", longest)  # 0: SDPA
    line = pack(drawn(seed, longest=30))
    torch.manual_seed(seed)
    tokens = len(line.ids_T)
    q = torch.randn(tokens, heads[0], 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(tokens, heads[1], width, dtype=torch.float64, requires_grad=True) for width in (8, 6))
    found = segment_attention(q, k, v, line.segments)
    wanted = alone(q, k, v, line.segments, heads[0] // heads[1])
    weight = torch.randn_like(found)
    for one, other in zip(
        (found, *torch.autograd.grad((found * weight).sum(), (q, k, v))),
        (wanted, *torch.autograd.grad((wanted * weight).sum(), (q, k, v))),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, repeats: int) -> torch.Tensor:
    """Each segment by itself, by the definition."""
    outputs = []
    for segment in segments.segments:
        seen = segment.places()
        keys, values = (x[seen].repeat_interleave(repeats, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[segment.start : segment.stop], keys) / q.shape[-1] ** 0.5
        last = torch.arange(segment.queries)[:, None] + segment.keys - segment.queries
        scores = scores.masked_fill(torch.arange(segment.keys) > last, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


def test_lines_of_one_length_are_read_where_they_lie() -> None:
    segments = Segments([Segment(0, 4), Segment(4, 8)])
    assert segments.back is None and len(segments.pieces) == 1


def test_pieces_of_two_lengths_come_back_in_order() -> None:
    """Even where each piece is a run of the line."""
    segments = Segments([Segment(0, 2), Segment(2, 4), Segment(4, 14)])
    q, k, v = torch.randn(3, 14, 2, 4)
    found = segment_attention(q, k, v, segments)
    assert torch.allclose(found, alone(q, k, v, segments, 1), atol=1e-6)
