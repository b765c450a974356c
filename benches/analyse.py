"""What an adapter of rank 64 on every linear matrix of a model of 8B's shape tells of itself, beside the dense way.

Two adapters of random factors, made as they are read, one matrix at a time: norms, spectra and wasted ranks of the one;
the similarity of A, of B and of ΔW's own directions for all i and j; cosine and interference of both. This may take two
minutes and 4 GiB. The dense way forms ΔW and takes its singular value decomposition: timed on two matrices, of which
both ways must find the same singular values and directions.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from _record import options, record
from torch import Tensor

from lorakit.analyse import directions, expected, similarities, spectra
from lorakit.analyse.compare import compare
from lorakit.core.exchange import Exchange, Update, factored
from lorakit.core.values import Value

SECONDS, BYTES = 120, 4 << 30
TOLERANCE = 1e-5  # of the largest singular value; the dense way is float32's
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shape:
    """What is analysed."""

    layers: int = 32
    hidden: int = 4096
    keys: int = 1024
    gated: int = 14336
    rank: int = 64

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linear matrices."""
        attention = {"q": (self.hidden, self.hidden), "k": (self.keys, self.hidden), "v": (self.keys, self.hidden)}
        mlp = {"gate": (self.gated, self.hidden), "up": (self.gated, self.hidden), "down": (self.hidden, self.gated)}
        return {**attention, "o": (self.hidden, self.hidden), **mlp}


def main() -> None:
    """Analyse, compare with the dense way, print, write."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it runs, nothing else")
    arguments = parser.parse_args()
    shape = Shape(2, 256, 64, 512, 16) if arguments.quick else Shape()
    found = {**measured(shape), "dense": {name: beside_dense(shape, name) for name in ("k", "q")}}
    print(table(found))
    told = {"quick": arguments.quick, "threads": torch.get_num_threads(), "shape": asdict(shape)}
    record("analyse", told | found, arguments.json)
    if found["seconds"]["total"] > SECONDS or found["peak_bytes"] > BYTES:
        sys.exit(f"more than {SECONDS} s or {BYTES / 2**30:g} GiB")


def measured(shape: Shape) -> dict[str, Any]:
    """Seconds of each analysis, those of all threads together, and the most memory that this process held."""
    one, other = (adapter(shape, seed) for seed in (0, 1))
    began = time.process_time()
    seconds = {
        "spectra": timed(lambda: spectra(factored(one)))[0],
        "similarities": timed(lambda: alike(one, other, shape))[0],
        "compare": timed(lambda: compare(one, other))[0],
    }
    seconds |= {"total": sum(seconds.values()), "processor": time.process_time() - began}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parameters = sum(value.numel for value in one.values)
    return {"matrices": len(one.updates), "parameters": parameters, "seconds": seconds, "peak_bytes": peak}


def table(found: Mapping[str, Any]) -> str:
    """What the numbers say."""
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["seconds"].items())
    lines = [f"{found['matrices']} matrices, {found['parameters'] / 1e6:.0f} million parameters an adapter", spent]
    lines.append(f"peak {found['peak_bytes'] / 2**30:.2f} GiB, PyTorch and its libraries included")
    for name, one in found["dense"].items():
        ratio = one["ratio_to_dense"]
        lines.append(f"{name}: {one['thin']:.3f} s; the dense way {one['dense']:.2f} s, {ratio:.0f} times as long")
    return "\n".join(lines)


def adapter(shape: Shape, seed: int) -> Exchange:
    """An adapter whose tensors are drawn when they are read."""
    updates = []
    for layer in range(shape.layers):
        for number, (name, (out, inner)) in enumerate(shape.matrices.items()):
            start = ((seed * shape.layers + layer) * 7 + number) * 2
            a, b = drawn(shape.rank, inner, start), drawn(out, shape.rank, start + 1)
            updates.append(Update(f"layers.{layer}.{name}", a, b, alpha=16.0))
    return Exchange("peft", tuple(updates))


def drawn(rows: int, columns: int, seed: int) -> Value:
    """A Gaussian matrix."""

    def read() -> Tensor:
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

    return Value((rows, columns), torch.float32, read)


def alike(one: Exchange, other: Exchange, shape: Shape) -> None:
    """Every similarity of two adapters; what is random must share as much as random subspaces do."""
    for mine, theirs in zip(factored(one), factored(other), strict=True):
        found = similarities(directions(mine), directions(theirs))
        whole, chance = float(found["A"][-1, -1]), expected(shape.rank, shape.rank, mine.shape[1])
        if not 0.5 * chance < whole < 2 * chance:
            sys.exit(f"{mine.name}: random A share {whole:.4f}, not about {chance:.4f}")


def beside_dense(shape: Shape, name: str) -> dict[str, float]:
    """Seconds for the singular value decomposition of one update, thin and dense, after a comparison."""
    update = next(each for each in factored(adapter(shape, 0)) if each.name == f"layers.0.{name}")
    directions(update)  # once, so that no library starts while it is timed
    thin, ours = timed(lambda: directions(update))
    dense, (left_OK, values_K, _) = timed(lambda: decomposed(*update.read()))
    rank = len(ours.values_R)
    worst = float((ours.values_R - values_K[:rank]).abs().max() / values_K[0])
    within = float((ours.left_OR.T @ left_OK[:, :rank].double()).norm() / rank**0.5)
    if not (worst <= TOLERANCE and abs(within - 1) <= TOLERANCE):
        sys.exit(f"{update.name}: thin and dense singular values differ by {worst:.1e}, or directions: {within:.6f}")
    return {"thin": thin, "dense": dense, "ratio_to_dense": dense / thin, "difference": worst}


def decomposed(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one does who has only the dense update."""
    left_OK, values_K, right_KI = torch.linalg.svd(b_OR @ a_RI, full_matrices=False)
    return left_OK, values_K, right_KI


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


if __name__ == "__main__":
    main()
