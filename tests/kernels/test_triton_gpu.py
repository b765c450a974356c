from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lorakit.kernels import launch
from lorakit.kernels.gated import gated
from tests.kernels.cases import CASES, LARGE, Answers, Case, differences

pytestmark = pytest.mark.gpu
started = pytest.importorskip("tests.kernels.started", reason="no Triton", exc_type=ImportError)

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def plain(case: Case, dtype: torch.dtype | None = None) -> Answers:
    """The answers of the plain twin, on the same device."""
    with patch.object(launch, "runs_on", lambda device: False):
        return case.answers("cuda", dtype)


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_triton_is_as_right_as_plain_pytorch(case: Case) -> None:
    """float32 gives the same numbers; half precision is at most twice as far from float64."""
    with started.counted() as names:
        found = case.answers("cuda")
    wanted = plain(case)
    assert names
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in wanted.items()}
    if case.dtype is torch.float32:
        assert all(share <= 1e-5 for share in differences(found, wanted).values())
        return
    exact = plain(case, torch.float64)
    ours, theirs = differences(found, exact), differences(wanted, exact)
    least = ROUNDING[case.dtype] / 2  # where plain PyTorch is right by luck
    assert {name: (ours[name], theirs[name]) for name in ours if not ours[name] <= 2 * theirs[name] + least} == {}


def test_the_plain_twin_takes_what_triton_does_not() -> None:
    e, g = torch.randn(2, 3, 8, dtype=torch.float64, device="cuda")
    with started.counted() as names:
        found = gated(e, g)
        compiled = torch.compile(gated, backend="eager")(e.float(), g.float())
    assert not names
    torch.testing.assert_close(compiled, found.float())


@pytest.mark.parametrize("kernel", ["gated", "gated gradients", "norm", "norm gradient", "head", "update"])
def test_numbers_beyond_the_31st_bit(kernel: str) -> None:
    """The last rows of long tensors are what they are alone."""
    tokens, width = 2**19 + 9, 4096
    if torch.cuda.mem_get_info()[0] < 5 * 2 * tokens * width:
        pytest.skip("too little free memory")
    x, y = (torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    last = _called(kernel, x[-9:].clone(), y[-9:].clone())
    torch.testing.assert_close(_called(kernel, x, y)[-9:], last)


def _called(kernel: str, x: Tensor, y: Tensor) -> Tensor:
    weight, inverse = torch.ones_like(x[0]), torch.ones_like(x[:, :1], dtype=torch.float32)
    thin = torch.linspace(-1, 1, 8 * x.shape[1], device="cuda").to(x.dtype).view(8, -1)
    match kernel:
        case "gated":
            return started.triton_gated.product(x, y, "silu")
        case "gated gradients":
            return started.triton_gated.gradients(y, x, y, "silu")[1]
        case "norm":
            return started.triton_norm.normed(x, weight, 1e-5)[0]
        case "norm gradient":
            return started.triton_norm.gradient_of_x(y, x, weight, inverse)
        case "head":
            return started.triton_cross_entropy.softmax_minus_targets(x, y[:, 0].abs().long(), 0.1)[1]
    started.triton_low_rank.add_low_rank(y, x, thin, thin)
    return y


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_the_current_one() -> None:
    e, g = torch.randn(2, 5, 37)
    with started.counted() as names:
        found = gated(e.to("cuda:1"), g.to("cuda:1"))
    assert names
    torch.testing.assert_close(found.cpu(), gated(e, g))


def test_a_target_outside_the_vocabulary_makes_the_loss_nan() -> None:
    for target in (-100, 8):
        logits, targets = torch.randn(2, 8, device="cuda"), torch.tensor([3, target], device="cuda")
        assert started.triton_cross_entropy.softmax_minus_targets(logits, targets, 0.0)[0].isnan()
