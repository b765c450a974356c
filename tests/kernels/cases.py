"""Calls of the public kernels that Triton and plain PyTorch must answer alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from lorakit.kernels.cross_entropy import linear_cross_entropy
from lorakit.kernels.gated import Activation, gated
from lorakit.kernels.low_rank import low_rank_linear
from lorakit.kernels.norm import rms_norm

Answers = dict[str, Tensor]
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)
ACTIVATIONS = get_args(Activation)


@dataclass(frozen=True)
class Case:
    """One call: a kernel, a dtype, and whatever else describes it."""

    kernel: Callable[..., Answers]
    dtype: torch.dtype
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [self.kernel.__name__, str(self.dtype).removeprefix("torch.")]
        return "-".join([*told, *(f"{name}={value}" for name, value in self.fields.items())])

    def answers(self, device: str, dtype: torch.dtype | None = None) -> Answers:
        """Outputs and gradients; the same numbers in `dtype` instead where one is given."""
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=dtype or self.dtype, device=device)
            return torch.randn(shape, generator=generator).to(self.dtype).to(device, dtype)

        return self.kernel(make, **self.fields)


def gate(make: Any, shape: tuple[int, ...], activation: Activation = "silu", layout: str = "") -> Answers:
    """`parts`: the rows of e and of the gradient are parts of longer ones; `summed`: the gradient is one number."""
    e = (_part(make, shape) if layout == "parts" else make(*shape)).requires_grad_()
    g = make(*shape).requires_grad_()
    out = gated(e, g, activation)
    return {"out": out, **_gradients(out, make, layout, e=e, g=g)}


def norm(make: Any, shape: tuple[int, ...], layout: str = "") -> Answers:
    x = (_part(make, shape) if layout == "parts" else make(*shape)).requires_grad_()
    out = rms_norm(x, 1 + 0.1 * make(shape[-1]), 1e-5)
    return {"out": out, **_gradients(out, make, layout, x=x)}


def head(make: Any, rows: int, vocabulary: int, smoothing: float = 0.0, never: int = 0) -> Answers:
    """`never`: how many entries, the first ones, the bias makes impossible."""
    hidden, weight, bias = make(rows, 16), make(vocabulary, 16), make(vocabulary)
    bias[:never] = -torch.inf
    bias[16384:] += 20  # the second block has the highest
    targets = vocabulary - 1 - torch.arange(rows, device=hidden.device) * 5 % vocabulary
    loss, gradient = linear_cross_entropy(hidden, weight, bias, targets, scale=0.5, smoothing=smoothing)
    return {"loss": loss, "gradient": gradient}


def update(make: Any, shape: tuple[int, ...], out: int, rank: int, frozen: str = "", layout: str = "") -> Answers:
    """`frozen`: what takes no gradient; `transposed`: a layout that the kernel does not know."""
    x, weight = make(*shape), make(out, shape[-1]) / shape[-1] ** 0.5
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x
    a, b = make(rank, shape[-1]).float() / shape[-1] ** 0.5, make(out, rank).float()
    named = {"x": x, "a": a, "b": b}
    wanted = {name: tensor.requires_grad_() for name, tensor in named.items() if name != frozen}
    y = low_rank_linear(x, (x @ weight.T).detach(), weight, a, b, 0.5)
    return {"y": y, **_gradients(y, make, layout, **wanted)}


def remade(make: Any, shape: tuple[int, ...], of: str) -> Answers:
    """An update of what a norm or a gate made, which backward makes again for the gradient of A."""
    x, weight = make(*shape), make(16, shape[-1]) / shape[-1] ** 0.5
    a, b = (make(4, shape[-1]).float() / shape[-1] ** 0.5).requires_grad_(), make(16, 4).float()
    made = rms_norm(x, make(shape[-1]), 1e-5) if of == "norm" else gated(x, make(*shape))
    y = low_rank_linear(made, made @ weight.T, weight, a, b, 0.5)
    return {"y": y, **_gradients(y, make, "", a=a)}


def _part(make: Any, shape: tuple[int, ...]) -> Tensor:
    return make(*shape[:-1], shape[-1] + 11)[..., : shape[-1]]


def _gradients(out: Tensor, make: Any, layout: str, **inputs: Tensor) -> Answers:
    if layout == "summed":
        along = make(1).expand(out.shape)
    else:
        along = _part(make, out.shape) if layout == "parts" else make(*out.shape)
    found = torch.autograd.grad(out, list(inputs.values()), along)
    return {f"gradient of {name}": value for name, value in zip(inputs, found, strict=True)}


CASES = [
    *(Case(gate, dtype, {"shape": (3, 5, 37), "activation": name}) for dtype in FLOATS for name in ACTIVATIONS),
    *(Case(gate, dtype, {"shape": (2, 1030)}) for dtype in FLOATS),  # more than one block
    *(Case(gate, torch.float32, {"shape": (2, 3, 37), "layout": layout}) for layout in ("parts", "summed")),
    *(Case(norm, dtype, {"shape": shape}) for dtype in FLOATS for shape in ((2, 3, 37), (9, 200), (2, 1030))),
    *(Case(norm, torch.float32, {"shape": (2, 3, 37), "layout": layout}) for layout in ("parts", "summed")),
    *(Case(kernel, torch.float32, {"shape": (0, 37)}) for kernel in (gate, norm)),
    *(Case(head, dtype, {"rows": 5, "vocabulary": 37, "smoothing": s}) for dtype in FLOATS for s in (0.0, 0.1)),
    *(Case(head, torch.float32, {"rows": 2, "vocabulary": 16390, "smoothing": s}) for s in (0.0, 0.1)),
    Case(head, torch.float32, {"rows": 2, "vocabulary": 16390, "never": 16384}),
    *(Case(update, dtype, {"shape": (3, 11, 24), "out": 37, "rank": rank}) for dtype in HALF for rank in (1, 5, 20)),
    *(Case(update, dtype, {"shape": (70, 150), "out": 300, "rank": rank}) for dtype in HALF for rank in (16, 40)),
    *(Case(update, torch.float16, {"shape": (9, 24), "out": 37, "rank": 4, "frozen": name}) for name in "xab"),
    Case(update, torch.float16, {"shape": (3, 4, 24), "out": 37, "rank": 4, "layout": "summed"}),
    Case(update, torch.float16, {"shape": (9, 24), "out": 37, "rank": 4, "layout": "transposed"}),
    *(Case(remade, torch.float16, {"shape": (9, 37), "of": of}) for of in ("norm", "gate")),
]

LARGE = [  # of models of today, for devices and compilers
    *(Case(gate, torch.bfloat16, {"shape": (4096, 14336), "activation": name}) for name in ACTIVATIONS),
    *(Case(norm, torch.bfloat16, {"shape": shape}) for shape in ((4096, 4096), (4096, 32, 128), (64, 16384))),
    *(Case(head, torch.bfloat16, {"rows": 512, "vocabulary": 128256, "smoothing": s}) for s in (0.0, 0.1)),
    Case(head, torch.float32, {"rows": 64, "vocabulary": 262144}),
    *(Case(update, torch.bfloat16, {"shape": (2, 2048, 4096), "out": 1024, "rank": rank}) for rank in (8, 32, 64, 128)),
    Case(update, torch.bfloat16, {"shape": (130, 14336), "out": 4096, "rank": 16}),
    *(Case(remade, torch.bfloat16, {"shape": (2048, 4096), "of": of}) for of in ("norm", "gate")),
]


def differences(found: Answers, wanted: Answers) -> dict[str, float]:
    """The largest difference of each answer as a share of its largest value."""
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in wanted.items()}
    return {name: _difference(found[name].double(), wanted[name].double()) for name in wanted}


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item() if wanted.numel() else 0.0
