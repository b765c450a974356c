"""Matrix products of SmolLM2-135M in float32 on a CPU: those that lorakit chooses beside PyTorch's choice.

Of each layer's shape: x Wᵀ (forward) and g W (backward); of each input's width the thin products of rank 8: x Aᵀ, and
gᵀ x, which is A's gradient. Both give equal numbers before they are timed in turn, and the median counts.

Then what siblings that read the same input (q, k, v; gate, up) could share: their A-products and A-gradients one by
one, as lorakit takes them (`apart`), beside one product of all their rows with its slicing, and the gradients of all
put side by side (`stacked`). `share_of_layer` is the time this saves (below 0: loses), as a share of a block's products
with its weights, forward and backward.

Legend: T tokens, I in, O out, R rank, S rows of all siblings' A.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from _measure import interleaved
from _record import options, record
from torch import Tensor

from lorakit.kernels.product import product, takes

HIDDEN, KV, GATED, VOCABULARY = 576, 192, 1536, 49152
BLOCK = ((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), *[(HIDDEN, GATED)] * 2, (GATED, HIDDEN))
HEAD = (HIDDEN, VOCABULARY)
SIBLINGS = {"siblings qkv": 3, "siblings gate_up": 2}  # that read the same input, of the hidden width
RANK, TOKENS, HEAD_TOKENS, QUICK_TOKENS = 8, 512, 256, 16
TOLERANCE = 1e-5  # of the largest
Call = Callable[[], Sequence[Tensor]]


def main() -> None:
    """Compare, time, print, write."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens: shows that it runs, nothing else")
    parser.add_argument("--rounds", type=int, default=50, help="how often each takes each product")
    arguments = parser.parse_args()
    tokens, rounds = (QUICK_TOKENS, 1) if arguments.quick else (TOKENS, arguments.rounds)
    torch.manual_seed(0)
    found = {name: measured(name, calls, rounds) for name, calls in products(tokens)}
    block = sum(found[f"{way} {named(*shape)}"]["ours"] for shape in BLOCK for way in ("forward", "backward"))
    for name, count in SIBLINGS.items():
        found[name] = measured(name, siblings(tokens, count), rounds)
        found[name]["share_of_layer"] = (found[name]["apart"] - found[name]["stacked"]) / block
    print(table(found))
    told = {"quick": arguments.quick, "rounds": rounds, "tokens": tokens, "rank": RANK}
    told |= {"threads": torch.get_num_threads(), "onednn": takes(torch.ones(1, 1))}
    record("products", {**told, "block_seconds": block, **found}, arguments.json)


def products(tokens: int) -> Iterator[tuple[str, dict[str, Call]]]:
    """Each product by name, in both ways; the head's positions are fewer."""
    for width, out in dict.fromkeys((*BLOCK, HEAD)):
        rows = min(tokens, HEAD_TOKENS) if (width, out) == HEAD else tokens
        x_TI, g_TO, w_OI = torch.randn(rows, width), torch.randn(rows, out), torch.randn(out, width)
        yield f"forward {named(width, out)}", both(x_TI, w_OI)
        yield f"backward {named(width, out)}", both(g_TO, w_OI.T)
    for width in (HIDDEN, GATED):
        x_TI, g_TR, a_RI = torch.randn(tokens, width), torch.randn(tokens, RANK), torch.randn(RANK, width)
        yield f"x Aᵀ {named(width, RANK)}", both(x_TI, a_RI)
        yield f"gᵀ x {named(width, RANK)}", both(g_TR.T, x_TI.T)


def named(width: int, out: int) -> str:
    """A layer by its shape."""
    return f"{width} to {out}"


def both(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """x Wᵀ by lorakit and by PyTorch."""
    return {"ours": lambda: [product(x, weight)], "pytorch": lambda: [F.linear(x, weight)]}


def siblings(tokens: int, count: int) -> dict[str, Call]:
    """A-products and A-gradients of layers that read one input; A is kept stacked, its gradients arrive one by one."""
    x_TI, a_SI = torch.randn(tokens, HIDDEN), torch.randn(count * RANK, HIDDEN)
    factors, grads = a_SI.clone().split(RANK), [torch.randn(tokens, RANK) for _ in range(count)]

    def apart() -> Sequence[Tensor]:
        return [product(x_TI, a_RI) for a_RI in factors] + [product(g_TR.T, x_TI.T) for g_TR in grads]

    def stacked() -> Sequence[Tensor]:
        low_TS, grad_SI = product(x_TI, a_SI), product(torch.cat(grads, 1).T, x_TI.T)
        return [*low_TS.split(RANK, 1), *grad_SI.split(RANK)]

    return {"apart": apart, "stacked": stacked}


def measured(name: str, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """The median seconds of two calls, and how many times longer the second takes, after a comparison."""
    (ours, mine), (other, theirs) = calls.items()
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine(), theirs(), strict=True))
    if not worst <= TOLERANCE:
        sys.exit(f"{name}: {ours} and {other} differ by {worst:.1e} of the largest value, more than {TOLERANCE}")
    spent = interleaved({each: repeated(call) for each, call in calls.items()}, 1, rounds)
    seconds = {each: median(times) for each, [times] in spent.items()}
    return {**seconds, f"ratio_to_{other}": seconds[other] / seconds[ours]}


def repeated(call: Call) -> Iterator[None]:
    """Whatever is asked of it, as `interleaved` asks."""
    while True:
        call()
        yield


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each product."""
    lines = ["| | ms | the other's ms | times as fast | saves of a block |", "|---" * 5 + "|"]
    for name, result in found.items():
        mine, other, ratio, *share = result.values()
        told = (f"{mine * 1e3:.3f}", f"{other * 1e3:.3f}", f"{ratio:.2f} ×", "".join(f"{each:.1%}" for each in share))
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
