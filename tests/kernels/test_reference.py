"""The plain kernels against autograd's own way to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels import cross_entropy
from lorakit.kernels.cross_entropy import linear_cross_entropy
from lorakit.kernels.gated import Activation, gated
from lorakit.kernels.low_rank import low_rank_linear
from lorakit.kernels.norm import rms_norm

T, IN, OUT, RANK = 6, 8, 10, 3
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda e: F.gelu(e, approximate="tanh"),
}
BY_HAND: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    **{
        name: (lambda e, g, a=name: gated(e, g, a), lambda e, g, a=act: a(e) * g, ((2, T, IN), (2, T, IN)))
        for name, act in ACTIVATIONS.items()
    },
    "norm": (lambda x: rms_norm(x, _weight(x), 1e-5), lambda x: _llama_norm(x, _weight(x)), ((2, T, IN),)),
    "low rank": (
        lambda x, a, b: low_rank_linear(x, (x @ _base(x).T).detach(), _base(x), a, b, 0.5),
        lambda x, a, b: x @ _base(x).T + 0.5 * ((x @ a.to(x.dtype).T) @ b.to(x.dtype).T),
        ((2, T, IN), (RANK, IN), (OUT, RANK)),
    ),
}


def _weight(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.shape[-1]).to(x.dtype)


def _llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _base(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, OUT * IN).view(OUT, IN).sin().to(x.dtype)


def _leaves(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _answers(forward: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = forward(*leaves)
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, along)]


def _error(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def saved(forward: Callable[[], Any]) -> list[Tensor]:
    """What autograd keeps for backward, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    return list(kept.values())


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return {x.untyped_storage().data_ptr() for x in found} == {x.untyped_storage().data_ptr() for x in wanted}


@pytest.mark.parametrize("name", BY_HAND)
def test_answers_are_those_of_autograd(name: str) -> None:
    ours, plain, shapes = BY_HAND[name]
    exact = 1e-12 if name != "norm" else 1e-6  # its mean is float32
    assert max(_error(_answers(ours, _leaves(shapes)), _answers(plain, _leaves(shapes)))) <= exact


@pytest.mark.parametrize("name", BY_HAND)
def test_bfloat16_is_at_most_twice_as_wrong_as_the_plain_path(name: str) -> None:
    ours, plain, shapes = BY_HAND[name]
    wide = tuple((64, *shape) if len(shape) == 3 else shape for shape in shapes)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in _leaves(wide)]
    exact = _answers(plain, [leaf.detach().double().requires_grad_() for leaf in half])
    pairs = zip(_error(_answers(ours, half), exact), _error(_answers(plain, half), exact), strict=True)
    assert [pair for pair in pairs if not pair[0] <= 2 * pair[1]] == []


def test_every_activation_is_tested() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS)


def test_a_gate_keeps_its_two_inputs_alone() -> None:
    e, g = _leaves(((T, IN), (T, IN)))
    assert _same(saved(lambda: gated(e, g)), [e, g])
    assert len(saved(lambda: F.silu(e) * g)) == 3


def test_a_norm_keeps_its_input_and_one_number_a_token() -> None:
    x, weight = torch.randn(T, IN).requires_grad_(), torch.ones(IN)
    kept = saved(lambda: rms_norm(x, weight, 1e-5))
    rest = [tensor for tensor in kept if not _same([tensor], [x]) and not _same([tensor], [weight])]
    assert len(kept) == 3
    assert [(tensor.numel(), tensor.dtype) for tensor in rest] == [(T, torch.float32)]


def test_an_update_keeps_x_and_thin_factors_but_not_y() -> None:
    x, a, b = (leaf.detach().float().requires_grad_() for leaf in _leaves(BY_HAND["low rank"][2]))
    y, weight = (x @ _base(x).T).detach(), _base(x)
    kept = saved(lambda: low_rank_linear(x, y, weight, a, b, 0.5))
    assert any(_same([tensor], [x]) for tensor in kept)
    assert not any(_same([tensor], [y]) for tensor in kept)
    own = sum(tensor.nbytes for tensor in kept if not any(_same([tensor], [known]) for known in (x, weight, a)))
    assert own == 4 * (2 * T * RANK + RANK * OUT)


@pytest.mark.parametrize("of", ["norm", "gate"])
def test_an_update_keeps_what_its_input_is_made_of_instead(of: str) -> None:
    x, e, a, b = _leaves(((T, IN), (T, IN), (RANK, IN), (OUT, RANK)))

    def make() -> Tensor:
        return rms_norm(x, _weight(x), 1e-5) if of == "norm" else gated(x, e)

    def update(made: Tensor) -> Tensor:
        return low_rank_linear(made, (made @ _base(x).T).detach(), _base(x), a, b, 0.5)

    made = make()
    assert not any(_same([tensor], [made]) for tensor in saved(lambda: update(made)))
    found = torch.autograd.grad(update(make()).sum(), [x, a, b])
    wanted = torch.autograd.grad(update(make().clone()).sum(), [x, a, b])  # nothing is noted on a copy
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("trained", ["xab", "ab", "x", "a", "b"])
def test_an_update_makes_the_gradients_that_are_wanted(trained: str) -> None:
    ours, plain, shapes = BY_HAND["low rank"]
    found, wanted = _leaves(shapes), _leaves(shapes)
    for forward, leaves in ((ours, found), (plain, wanted)):
        for name, leaf in zip("xab", leaves, strict=True):
            leaf.requires_grad_(name in trained)
        forward(*leaves).square().sum().backward()
    assert [name for name, leaf in zip("xab", found, strict=True) if leaf.grad is not None] == list(trained)
    for leaf, same in zip(found, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, same.grad)


def test_an_update_is_written_where_y_lies() -> None:
    x, a, b = (leaf.detach() for leaf in _leaves(BY_HAND["low rank"][2]))
    y = x @ _base(x).T
    assert low_rank_linear(x, y, _base(x), a, b, 0.5).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("positions", [0, 1, 4, 5, 8, 9])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [True, False])
def test_cross_entropy_is_whole_across_chunks(
    positions: int, smoothing: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 4)
    hidden, weight, bias = (torch.randn(shape) for shape in ((positions, IN), (OUT, IN), (OUT,)))
    targets = torch.arange(positions) * 3 % OUT
    given = bias if biased else None
    loss, gradient = linear_cross_entropy(hidden, weight, given, targets, scale=0.25, smoothing=smoothing)
    hidden.requires_grad_()
    wanted = F.cross_entropy(F.linear(hidden, weight, given), targets, reduction="sum", label_smoothing=smoothing)
    (to_hidden,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, 0.25 * to_hidden)


def test_cross_entropy_of_sure_and_impossible_entries_is_finite() -> None:
    hidden = torch.eye(2) * 200
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    loss, gradient = linear_cross_entropy(hidden, torch.eye(3, 2), bias, torch.tensor([0, 0]), scale=1.0)
    torch.testing.assert_close(loss, torch.tensor(200.0))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_cross_entropy_in_bfloat16_is_at_most_twice_as_wrong_as_the_plain_path() -> None:
    hidden, weight = torch.randn(300, IN).bfloat16(), torch.randn(50, IN).bfloat16()
    targets = torch.arange(300) % 50

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        logits = leaf @ weight.to(dtype).T
        loss = F.cross_entropy(logits.float() if dtype == torch.bfloat16 else logits, targets, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    exact, ours = plain(torch.float64), list(linear_cross_entropy(hidden, weight, None, targets, scale=1.0))
    pairs = list(zip(_error(ours, exact), _error(plain(torch.bfloat16), exact), strict=True))
    assert [pair for pair in pairs if not pair[0] <= 2 * pair[1] + 1e-6] == []


def test_what_is_made_again_is_made_once_for_all_its_readers() -> None:
    from lorakit.kernels.remade import recipe, remember

    calls: list[int] = []

    def make(one: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return one * 2

    one = torch.ones(2)
    two = remember(one * 2, make, one)
    readers = [recipe(two) for _ in range(3)]
    found = [remaker(*tensors) for remaker, tensors in readers]
    assert len(calls) == 1 and all(each is found[0] for each in found)
    assert readers[0][0].made is None
    readers[0][0](*readers[0][1])  # a second backward through the same graph
    assert len(calls) == 2 and readers[0][0].made is None
