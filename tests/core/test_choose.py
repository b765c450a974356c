"""Choosing weights: a budget is never exceeded, and goes where the scores say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.calibrate import calibrate
from lorakit.core.choose import NEEDS, By, Choice, check_terms, choose, normalised_feature_norm, weights_of
from lorakit.core.layouts import LinearLayout, layout_of
from lorakit.core.sites import Site, resolve
from lorakit.core.statistics import Key, Moment, SiteStatistics, Statistics
from lorakit.errors import BadMethod
from tests.laws.cases import close
from tests.tiny import tiny, tokens

SIDES = {"small": (4, 4), "wide": (4, 12), "large": (12, 12)}  # out, in; one direction costs 8, 16 or 24


def toy(**values: Any) -> tuple[list[Site], Statistics, dict[Key, Tensor]]:
    """Three sites with what each `values` says of them."""
    sites = [Site(name, "other", None, LinearLayout(ins, outs)) for name, (outs, ins) in SIDES.items()]
    found = {(name, None): SiteStatistics(shape=SIDES[name], tokens=9, **given) for name, given in values.items()}
    return sites, found, {(name, None): torch.eye(*SIDES[name]) for name in SIDES}


def gradients(**singular: list[float]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, values in singular.items():
        gradient_OI = torch.zeros(SIDES[name])
        gradient_OI[range(len(values)), range(len(values))] = torch.tensor(values)
        found[name] = {"gradient_OI": gradient_OI}
    return found


def told(choices: list[Choice]) -> list[tuple[str, int]]:
    return [(choice.site.path, choice.rank) for choice in choices]


GRADIENTS = gradients(small=[4.0, 1.0], wide=[5.0, 4.0, 0.1], large=[6.0, 1.0])  # a number brings 2, 1.56, 1.5 at first


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (8, [("small", 1)]),
        (24, [("small", 1), ("wide", 1)]),
        (40, [("wide", 2), ("small", 1)]),  # the large one does not fit, the next best does
        (48, [("small", 1), ("wide", 1), ("large", 1)]),
        (64, [("wide", 2), ("small", 1), ("large", 1)]),
        (10_000, [("wide", 3), ("small", 2), ("large", 2)]),  # and nothing for directions without a gradient
    ],
)
def test_gradient_energy_buys_the_best_directions(budget: int, expected: list[tuple[str, int]]) -> None:
    choices = choose(*toy(**GRADIENTS), budget=budget, by="gradient")
    assert told(choices) == expected
    for choice in choices:
        values = GRADIENTS[choice.site.path]["gradient_OI"].diagonal()
        assert choice.score == pytest.approx(float(values[: choice.rank].square().sum()))


def test_no_site_gets_more_than_the_largest_rank() -> None:
    choices = choose(*toy(**GRADIENTS), budget=10_000, by="gradient", rank=1)
    assert told(choices) == [("small", 1), ("wide", 1), ("large", 1)]


def test_variance_prefers_inputs_with_few_directions() -> None:
    spread = {"small": [1.0] * 4, "wide": [9.0, 3.0, *[0.0] * 10], "large": [1.0] * 12}
    moments = {
        name: {"inputs": Moment(9, torch.zeros(len(v)), torch.diag(torch.tensor(v)))} for name, v in spread.items()
    }
    choices = choose(*toy(**moments), budget=40, by="variance")
    assert told(choices) == [("small", 3), ("wide", 1)]  # by what a number brings, over all that was bought
    assert [choice.score for choice in choices] == pytest.approx([0.75, 0.75])


def test_feature_norms_go_from_the_lowest_on() -> None:
    norms = {name: {"norm_in": 1.0, "norm_out": out} for name, out in (("small", 3.0), ("wide", 1.0), ("large", 2.0))}
    sites, statistics, weights = toy(**norms)
    choices = choose(sites, statistics, weights, budget=100, by="nfn", rank=2)
    assert told(choices) == [("wide", 2), ("large", 2), ("small", 2)]
    assert told(choose(sites, statistics, weights, budget=70, by="nfn", rank=2)) == [
        ("wide", 2),
        ("large", 1),
        ("small", 1),
    ]
    assert choices[0].score == pytest.approx(1.0 / (2 / 12**0.5))


def test_random_features_have_the_norm_one() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(64, 48)
    site = Site("0", "other", None, layout_of(layer))
    x = torch.randn(4000, 64)
    flat, along = (
        calibrate(nn.Sequential(layer), [site], [{"input": each}], needs=NEEDS["nfn"])["0", None]
        for each in (x, x @ layer.weight.detach().T @ layer.weight.detach())
    )
    assert normalised_feature_norm(flat, layer.weight) == pytest.approx(1.0, rel=0.02)
    assert normalised_feature_norm(along, layer.weight) > 1.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("by", NEEDS)
def test_a_budget_on_a_model_is_never_exceeded(by: By, family: str) -> None:
    model = tiny(family)
    ids, sites = tokens(model, rows=8), resolve(model, ["linear"])
    statistics = calibrate(model, sites, [{"input_ids": ids, "labels": ids}], needs=NEEDS[by])
    weights, before = weights_of(model, sites), None
    for budget in (100, 500, 2000):
        choices = choose(sites, statistics, weights, budget=budget, by=by, rank=4)
        spent = sum(choice.numbers for choice in choices)
        assert budget - 80 < spent <= budget  # 80 numbers are the dearest direction
        assert all(1 <= choice.rank <= 4 for choice in choices)
        assert choices == choose(sites, statistics, weights, budget=budget, by=by, rank=4) != before
        before = choices


def test_weights_are_those_of_the_sites() -> None:
    model = tiny("gpt2")
    sites = resolve(model, ["attn.v", "mlp.up"])
    weights, x = weights_of(model, sites), torch.randn(3, 32)
    for site in sites:
        module = model.get_submodule(site.path)
        whole = module(x) - module.bias
        assert close(x @ weights[site.path, site.slice].T, whole if site.slice is None else site.slice.take(whole))


MISUSES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": (dict(budget=0), "a budget of 0 trained numbers buys nothing: the cheapest site, small, takes 8"),
    "negative": (dict(budget=-5), "a budget of -5 trained numbers buys nothing"),
    "too little": (dict(budget=7), "the cheapest site, small, takes 8 for rank 1"),
    "rank": (dict(rank=0), "the largest rank of a site is 0"),
    "word": (dict(by="size"), "one of gradient, variance, nfn, not by 'size'"),
    "other statistics": (dict(by="variance"), "the layer's inputs are needed and were not gathered"),
    "no norms": (dict(by="nfn"), "the mean norms .* were not gathered"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_a_sentence(case: str) -> None:
    changes, words = MISUSES[case]
    with pytest.raises(BadMethod, match=words):
        choose(*toy(**GRADIENTS), **{**dict(budget=100, by="gradient"), **changes})


@pytest.mark.parametrize("targets", ["attn.q,attn.qkv", "attn.qkv,attn.k,mlp.up"])
def test_a_layer_is_not_bought_both_whole_and_in_slices(targets: str) -> None:
    sites = resolve(tiny("gpt2"), targets.split(","))
    with pytest.raises(BadMethod, match=r"c_attn is among the candidates as attn.qkv and attn.[qk], which"):
        check_terms(sites, budget=1000, by="gradient", rank=2)
    check_terms(resolve(tiny("gpt2"), ["attn.q", "attn.v", "mlp.up"]), budget=1000, by="gradient", rank=2)


def test_sites_without_statistics_are_named() -> None:
    sites, statistics, weights = toy(small=GRADIENTS["small"])
    with pytest.raises(BadMethod, match="no statistics of wide, large"):
        choose(sites, statistics, weights, budget=100, by="gradient")
    with pytest.raises(BadMethod, match="no statistics of any site"):
        choose([], statistics, weights, budget=100, by="gradient")
    moments = {name: {"inputs": Moment(9, torch.zeros(4), torch.eye(4))} for name in ("small",)}
    one, found, given = toy(**moments)
    with pytest.raises(BadMethod, match="the gradients of the loss are needed"):
        choose(one[:1], found, given, budget=100, by="gradient")
