"""Triton's kernels beside their plain twins on a CUDA device, in turn, after both gave the same answers.

bfloat16, shapes of models of 135M and 8B parameters; `traffic` is what a call has to read and write, in TB/s. On a
machine without CUDA there is nothing to compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch
from _record import options, record
from torch import Tensor

from lorakit.kernels import launch
from lorakit.kernels.cross_entropy import linear_cross_entropy
from lorakit.kernels.gated import gated
from lorakit.kernels.low_rank import low_rank_linear
from lorakit.kernels.norm import rms_norm

TOKENS = 8192
TOLERANCE = 2e-2  # of the largest value: some roundings of bfloat16
FLUSHED_BYTES = 2**30  # written before each call: its inputs are not in the cache, and its kernels wait in line
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Scenario:
    """A call, the bytes that it has to read and write if these decide its time, and what it changes, made each time."""

    call: Call
    traffic: int | None = None
    fresh: Callable[[], tuple[Tensor, ...]] = tuple


def main() -> None:
    """Compare, time, print, write."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels: no CUDA device here, so nothing to compare")
        return record("triton_kernels", {"device": "cpu", "scenarios": {}}, arguments.json)
    if not launch.runs_on(torch.device("cuda", 0)):
        sys.exit("kernels: Triton does not run on this device; the warning above says why")
    found = {}
    for name, make in SCENARIOS.items():
        torch.manual_seed(0)
        found[name] = measured(name, make(), arguments.rounds)
        told = ", ".join(f"{what} {value:.3g}" for what, value in found[name].items())
        print(f"{name:>32}: {told}", flush=True)
    record("triton_kernels", {"device": torch.cuda.get_device_name(0), "scenarios": found}, arguments.json)


def measured(name: str, scenario: Scenario, rounds: int) -> dict[str, float]:
    """Milliseconds of both, after a comparison."""

    def plain(*given: Tensor) -> tuple[Tensor, ...]:
        with patch.object(launch, "runs_on", lambda device: False):
            return scenario.call(*given)

    pairs = zip(scenario.call(*scenario.fresh()), plain(*scenario.fresh()), strict=True)
    worst = max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)
    if not worst <= TOLERANCE:
        sys.exit(f"{name}: Triton and plain PyTorch differ by {worst:.1e} of the largest value, more than {TOLERANCE}")
    spent = interleaved({"ours": scenario.call, "plain": plain}, scenario.fresh, rounds)
    found = {**spent, "ratio_to_plain": spent["plain"] / spent["ours"], "largest_difference": worst}
    return found if scenario.traffic is None else {**found, "traffic": scenario.traffic / spent["ours"] / 1e9}


def interleaved(calls: Mapping[str, Call], fresh: Callable[[], tuple[Tensor, ...]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, taken in turn; the first three rounds warm up."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(rounds + 3):
        for name, call in calls.items():
            given = fresh()
            flushed.zero_()
            begin.record()
            call(*given)
            end.record()
            end.synchronize()
            spent[name].append(begin.elapsed_time(end))
    return {name: median(values[3:]) for name, values in spent.items()}


def made(*shape: int, learns: bool = False) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_(learns)


def both_ways(forward: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """Forward and backward as one call."""
    along = torch.randn_like(forward())
    return lambda: ((out := forward()).detach(), *torch.autograd.grad(out, inputs, along))


def gate(width: int) -> Scenario:
    """Reads e and g twice and the gradient; writes the product and two gradients."""
    e, g = (made(TOKENS, width, learns=True) for _ in range(2))
    return Scenario(both_ways(lambda: gated(e, g), e, g), 8 * e.nbytes)


def norm(*shape: int) -> Scenario:
    """Reads x twice and the gradient; writes the normed value and one gradient."""
    x, weight = made(*shape, learns=True), made(shape[-1])
    return Scenario(both_ways(lambda: rms_norm(x, weight, 1e-5), x), 5 * x.nbytes)


def update(tokens: int, width: int, out: int, rank: int) -> Scenario:
    """The update alone, forward: reads x and y, writes y."""
    x, y, a, b = made(tokens, width), made(tokens, out), made(rank, width) / width**0.5, made(out, rank)
    weight = made(out, width)
    return Scenario(
        lambda y: (low_rank_linear(x, y, weight, a, b, 2.0),), x.nbytes + 2 * y.nbytes, lambda: (y.clone(),)
    )


def trained(tokens: int, width: int, out: int, rank: int) -> Scenario:
    """A whole layer, forward and backward, with the products of the base."""
    x, weight = made(tokens, width, learns=True), made(out, width) / width**0.5
    a, b = (made(rank, width) / width**0.5).requires_grad_(), made(out, rank, learns=True)
    return Scenario(both_ways(lambda: low_rank_linear(x, x.detach() @ weight.T, weight, a, b, 2.0), x, a, b))


def head(positions: int, width: int, vocabulary: int) -> Scenario:
    """The loss of a whole head, with its two products."""
    hidden, weight = made(positions, width), made(vocabulary, width) / width**0.5
    targets = torch.randint(vocabulary, (positions,), device="cuda")
    return Scenario(lambda: linear_cross_entropy(hidden, weight, None, targets, scale=1.0))


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "swiglu 1536": lambda: gate(1536),
    "swiglu 14336": lambda: gate(14336),
    "rms norm 576": lambda: norm(TOKENS, 576),
    "rms norm 4096": lambda: norm(TOKENS, 4096),
    "rms norm of 32 heads of 128": lambda: norm(TOKENS, 32, 128),
    "update 576 to 576, rank 8": lambda: update(TOKENS, 576, 576, 8),
    "update 4096 to 4096, rank 16": lambda: update(TOKENS, 4096, 4096, 16),
    "update 4096 to 4096, rank 64": lambda: update(TOKENS, 4096, 4096, 64),
    "update 4096 to 4096, 512 tokens": lambda: update(512, 4096, 4096, 16),
    "update 14336 to 4096, rank 16": lambda: update(TOKENS, 14336, 4096, 16),
    "layer 4096 to 4096, rank 16": lambda: trained(TOKENS, 4096, 4096, 16),
    "layer 4096 to 14336, rank 16": lambda: trained(TOKENS, 4096, 14336, 16),
    "head 576 to 49152": lambda: head(TOKENS, 576, 49152),
    "head 4096 to 128256": lambda: head(TOKENS // 4, 4096, 128256),
}


if __name__ == "__main__":
    main()
