"""What holds for every initialisation, and the sentences with which they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import registry
from lorakit.core.calibrate import calibrate
from lorakit.core.initialise import initialisation
from lorakit.core.layouts import layout_of
from lorakit.core.sites import Site
from lorakit.core.statistics import NEEDS, Moment, SiteStatistics
from lorakit.errors import BadMethod, UnknownName
from tests.laws.cases import close
from tests.tiny import tiny, tokens

EVERY = registry.names("lorakit.inits")
SIZES = ((5, 9), (9, 5))  # out, in


def statistics_of(weight_OI: Tensor, tokens: int = 60) -> SiteStatistics:
    """Everything that calibration gathers at one linear layer, from random data of uneven variance."""
    outs, ins = weight_OI.shape
    layer = nn.Linear(ins, outs)
    layer.weight.data = weight_OI.float()
    target = torch.randn(tokens, outs)
    x = (torch.randn(tokens, ins) + 1) * torch.arange(1, ins + 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(**batch) - target).pow(2).sum()

    site = Site("0", "other", None, layout_of(layer))
    return calibrate(nn.Sequential(layer), [site], [{"input": x}], needs=NEEDS, loss=loss)["0", None]


@pytest.fixture(params=SIZES, ids=str)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(*request.param)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_have_their_shapes_and_are_float32_on_the_cpu(name: str, dtype: torch.dtype, weight: Tensor) -> None:
    statistics = statistics_of(weight.to(dtype))
    a_RI, b_OR = initialisation(name).factors(weight.to(dtype), 2, statistics, "layer")
    assert a_RI.shape == (2, weight.shape[1]) and b_OR.shape == (weight.shape[0], 2)
    for factor in (a_RI, b_OR):
        assert factor.dtype == torch.float32 and factor.device.type == "cpu" and factor.is_contiguous()
        assert bool(factor.isfinite().all())
    assert bool(a_RI.any())


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_gives_one_start(name: str, weight: Tensor) -> None:
    statistics, starts = statistics_of(weight), []
    for _ in range(2):
        torch.manual_seed(5)
        starts.append(initialisation(name).init(weight, 2, statistics))
    assert torch.equal(starts[0][0], starts[1][0]) and torch.equal(starts[0][1], starts[1][1])


@pytest.mark.parametrize("name", [name for name in EVERY if initialisation(name).needs])
def test_statistics_that_are_needed_are_asked_for(name: str) -> None:
    weight, needs = torch.randn(9, 9), initialisation(name).needs
    whole = statistics_of(weight)
    fields = {"gradient": "gradient_OI"}
    for need in needs:
        values = {**vars(whole), fields.get(need, need): () if need == "folds" else None}
        with pytest.raises(BadMethod, match=rf"layer\.3 cannot be initialised by '{name}': .* needs=\(\"{need}\",\)"):
            initialisation(name).factors(weight, 2, SiteStatistics(**values), "layer.3")
    with pytest.raises(BadMethod, match="pass calibration data"):
        initialisation(name).factors(weight, 2, None, "layer.3")
    unasked = dict.fromkeys(fields.values()) | {"inputs": None, "outputs": None, "errors": None, "folds": ()}
    asked = {fields.get(need, need): getattr(whole, fields.get(need, need)) for need in needs}
    initialisation(name).init(weight, 2, SiteStatistics(**{**vars(whole), **unasked, **asked}))


@pytest.mark.parametrize("name", [name for name in EVERY if initialisation(name).needs - {"gradient"}])
def test_fewer_tokens_than_the_rank_are_refused(name: str) -> None:
    weight = torch.randn(9, 9)
    with pytest.raises(BadMethod, match=r"come from too few tokens \(3\), which span fewer than 3 directions"):
        initialisation(name).init(weight, 3, statistics_of(weight, tokens=3))
    initialisation(name).init(weight, 3, statistics_of(weight, tokens=4))


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith("covariance")])
def test_an_adapter_from_too_few_tokens_names_the_layer(name: str) -> None:
    model, method = tiny("llama"), lk.LoRA(rank=4, init=name)
    few = tokens(model)[:1, :3]
    found = calibrate(model, method.sites(model), [{"input_ids": few, "labels": few}], needs=method.needs())
    with pytest.raises(BadMethod, match=rf"layers\.0\.self_attn\.q_proj cannot be initialised by '{name}': .*too few"):
        lk.attach(model, method, statistics=found)


READS_WEIGHT = ("pissa", "pissa-randomised", "olora", "covariance-corda", "covariance-corda-kpm", "covariance-both")


@pytest.mark.parametrize("name", READS_WEIGHT)
def test_weights_that_cannot_be_decomposed_are_refused(name: str) -> None:
    weight, statistics = torch.randn(9, 5), statistics_of(torch.randn(9, 5))
    init = initialisation(name)
    with pytest.raises(BadMethod, match=r"rank 6 is above the smaller side of the matrix \(9, 5\)"):
        init.init(weight, 6, statistics)
    with pytest.raises(BadMethod, match="on the meta device"):
        init.init(weight.to("meta"), 2, statistics)
    weight[3, 2] = torch.nan
    with pytest.raises(BadMethod, match=r"h\.0 cannot be initialised by .*: the weight holds NaN"):
        init.factors(weight, 2, statistics, "h.0")


def test_refusals_of_single_initialisations() -> None:
    weight = torch.randn(9, 5)
    zero = SiteStatistics(shape=(9, 5), tokens=60, gradient_OI=torch.zeros(9, 5),
                          inputs=Moment(60, torch.zeros(5), torch.zeros(5, 5)))  # fmt: skip
    with pytest.raises(BadMethod, match="even, not 3"):
        initialisation("orthogonal").init(weight, 3, None)
    with pytest.raises(BadMethod, match=r"takes 6 directions of a matrix \(9, 5\); the largest rank there is 2"):
        initialisation("gradient").init(weight, 3, statistics_of(weight))
    with pytest.raises(BadMethod, match="zero everywhere, so it has no directions"):
        initialisation("gradient-paper").init(weight, 2, zero)
    with pytest.raises(BadMethod, match="zero everywhere; calibrate on other data"):
        initialisation("covariance-corda").init(weight, 2, zero)
    with pytest.raises(BadMethod, match="rank 6 is above the layer's width 5"):
        initialisation("covariance-eva").init(weight, 6, statistics_of(weight))
    with pytest.raises(BadMethod, match=r"statistics of x are of \(9, 5\), not of \(5, 9\)"):
        initialisation("covariance-eva").factors(weight.T, 2, zero, "x")
    with pytest.raises(UnknownName, match="did you mean pissa"):
        initialisation("pisa")


@pytest.mark.parametrize("name", ["gaussian", "kaiming", "covariance-eva", "structured", "structured-line"])
def test_starts_that_need_nothing_taken_off(name: str, weight: Tensor) -> None:
    assert not initialisation(name).init(weight, 2, statistics_of(weight))[1].any()


def test_pissa_is_the_best_approximation_and_both_forms_agree(weight: Tensor) -> None:
    weight = weight * 0.5 ** torch.arange(weight.shape[1])  # values that fall fast
    singular = torch.linalg.svdvals(weight.double())
    for name in ("pissa", "pissa-randomised"):
        a_RI, b_OR = initialisation(name).init(weight, 3, None)
        rest = (weight - b_OR @ a_RI).double().norm()
        assert float(rest) == pytest.approx(float(singular[3:].norm()), rel=1e-4)
        assert close(a_RI.norm(dim=1), b_OR.norm(dim=0))  # the size is split evenly


def test_olora_and_pissa_of_full_rank_are_the_weight(weight: Tensor) -> None:
    for name in ("olora", "pissa", "covariance-corda", "covariance-corda-kpm", "covariance-both"):
        a_RI, b_OR = initialisation(name).init(weight, 5, statistics_of(weight))
        assert close(b_OR @ a_RI, weight, 1e-4), name


def test_gradient_of_the_paper_has_unit_directions_of_one_scale() -> None:
    weight = torch.randn(16, 9)
    statistics = statistics_of(weight)
    a_RI, b_OR = initialisation("gradient-paper").init(weight, 2, statistics)
    scale = 16**0.25 / 16**0.5
    assert close(a_RI @ a_RI.T, scale**2 * torch.eye(2)) and close(b_OR.T @ b_OR, scale**2 * torch.eye(2))
    gradient_OI = statistics.gradient_OI
    assert gradient_OI is not None
    energy = torch.linalg.svdvals(gradient_OI)
    assert close((gradient_OI @ a_RI.T).norm(dim=0) / scale, energy[:2])  # A takes the first two, B the next two
    assert close((b_OR.T @ gradient_OI).norm(dim=1) / scale, energy[2:4])
