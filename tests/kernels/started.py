"""What the kernels do without a GPU: `TRITON_INTERPRET=1 python -m tests.kernels.started` runs the cases in Triton's
interpreter and prints by how much they differ from plain PyTorch; with a compute capability (90) behind it, it compiles
the large ones for such a device and prints what they take of it. Both are asked for before Triton is imported, hence a
process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from lorakit.kernels import launch, triton_cross_entropy, triton_gated, triton_low_rank, triton_norm
from tests.kernels.cases import CASES, LARGE, Case, differences, update

MODULES = (triton_cross_entropy, triton_gated, triton_low_rank, triton_norm)


@contextmanager
def starting(start: Callable[..., None]) -> Iterator[None]:
    """`start` in the place of what starts kernels."""
    with ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(patch.object(module, "launch", start))
        yield


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels that are started meanwhile."""
    names: list[str] = []

    def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        names.append(kernel.__name__)
        launch.launch(kernel, grid, *arguments, **settings)

    with starting(start):
        yield names


def interpreted(case: Case) -> dict[str, Any]:
    """The kernels that started, and the differences from the plain answers."""
    plain = case.answers("cpu")
    several = patch.object(triton_low_rank, "_processors", lambda device: 5)
    with patch.object(launch, "takes", _always), several, counted() as names:
        fused = case.answers("cpu")
    assert {name: x.dtype for name, x in fused.items()} == {name: x.dtype for name, x in plain.items()}
    return {"started": names, "differences": differences(fused, plain)}


def _always(*tensors: torch.Tensor) -> bool:
    return True


def compiled(case: Case) -> dict[str, int]:
    """The bytes of shared memory of each kernel of a case, compiled as a launch would and not started."""
    shared: dict[str, int] = {}

    def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        shared[kernel.__name__] = kernel.warmup(*arguments, grid=grid, **settings).metadata.shared

    with patch.object(launch, "takes", _always), starting(start):
        case.answers("meta")
    return shared


class Absent:
    """As much of Triton's driver of a device as compiling for it asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(*capabilities: str) -> None:
    if not capabilities:  # its dots do not know bfloat16
        known = [case for case in CASES if case.kernel is not update or case.dtype is torch.float16]
        print(json.dumps({str(case): interpreted(case) for case in known}))
        return
    from triton.runtime import driver

    for capability in capabilities:
        driver.set_active(Absent(int(capability)))
        print(json.dumps({str(case): compiled(case) for case in LARGE}))


if __name__ == "__main__":
    main(*sys.argv[1:])
