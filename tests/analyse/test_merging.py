"""Identities of merging, for every recipe; PEFT's own results where it is right; what is refused."""

from __future__ import annotations

import base64
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorakit as lk
from lorakit.analyse.compress import compress
from lorakit.analyse.merging import Merged, merge_adapters
from lorakit.analyse.ranks import keeping
from lorakit.analyse.recipes import RECIPES, Recipe, recipe
from lorakit.core.exchange import Exchange, Update, factored
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, BadMethod, UnknownName
from lorakit.interop.format import Told
from lorakit.interop.formats import peft
from tests.analyse.adapters import FORMS, FUSED, LAYER, adapter, close, convolution, delta, deltas, fused, update
from tests.tiny import tiny, tokens

FULL = 12  # no matrix has more rank
WHOLE = [  # recipes that leave nothing of one adapter out
    recipe("linear"),
    recipe("concatenation"),
    recipe("svd"),
    recipe("ties", density=1.0),
    recipe("ties", density=1.0, election="frequency"),
    recipe("dare", density=1.0),
    recipe("dare-ties", density=1.0),
]
EVERY = [
    *WHOLE,
    recipe("svd", rank=FULL),
    recipe("ties", density=0.3, rank=FULL),
    recipe("ties", density=0.3, election="frequency", rank=FULL),
    recipe("dare", density=0.4, rank=FULL),
    recipe("dare-ties", density=0.4, seed=3, election="frequency", rank=FULL),
]
SUMS = [recipe("concatenation"), recipe("svd", rank=FULL), recipe("dare", density=1.0, rank=FULL)]
every = pytest.mark.parametrize("how", EVERY, ids=str)


def three() -> dict[str, Exchange]:
    return {name: adapter(update(seed)) for seed, name in enumerate(("one", "two", "three"))}


def made(how: Recipe, weights: dict[str, float], adapters: dict[str, Exchange] | None = None) -> torch.Tensor:
    found = merge_adapters(adapters or three(), weights, how)
    (only,) = found.exchange.updates
    assert only.scale == 1
    return delta(only)


def test_every_recipe_is_tried_here() -> None:
    assert {type(how) for how in EVERY} == set(RECIPES.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", WHOLE, ids=str)
def test_one_adapter_of_weight_one_is_itself_in_every_form(how: Recipe, form: Any) -> None:
    alone = adapter(form(), whole={"head.weight": value_of(torch.ones(2))}, base="some/base", task="CAUSAL_LM")
    found = merge_adapters({"it": alone}, {"it": 1.0}, how)
    (only,), (before,) = found.exchange.updates, alone.updates
    assert (only.form, only.path, only.a.shape[1:], only.b.shape) == (
        *(before.form, before.path, before.a.shape[1:], before.b.shape),
    )
    assert close(delta(only), delta(before)) and found.lost < 1e-6
    assert [each.name for each in found.matrices] == [each.name for each in factored(alone)]
    assert torch.equal(found.exchange.whole["head.weight"].read(), torch.ones(2)) and not found.notes
    assert (found.exchange.base, found.exchange.task) == ("some/base", "CAUSAL_LM")


@every
def test_turning_all_weights_round_turns_the_result_round(how: Recipe) -> None:
    weights = {"one": 0.7, "two": -1.0, "three": 0.4}
    turned = {name: -weight for name, weight in weights.items()}
    assert close(made(how, turned), -made(how, weights))


@every
def test_weight_zero_is_leaving_out(how: Recipe) -> None:
    adapters = three()
    left = {name: adapters[name] for name in ("one", "three")}
    found = made(how, {"one": 1.0, "two": 0.0, "three": 0.5}, adapters)
    assert torch.equal(found, made(how, {"one": 1.0, "three": 0.5}, left))


@every
def test_the_order_of_adapters_does_not_matter(how: Recipe) -> None:
    weights, adapters = {"one": 1.0, "two": 0.6, "three": -0.5}, three()
    found = [made(how, weights, {name: adapters[name] for name in order}) for order in permutations(adapters)]
    assert all(close(each, found[0], 2e-6) for each in found)


@every
def test_scaling_the_weights_scales_the_result(how: Recipe) -> None:
    weights = {"one": 1.0, "two": 0.6, "three": -0.5}
    assert close(made(how, {name: 3 * weight for name, weight in weights.items()}), 3 * made(how, weights))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", SUMS, ids=str)
def test_sums_are_the_weighted_sum_of_updates_of_any_rank(how: Recipe, form: Any) -> None:
    """Task arithmetic: negative weights, other ranks, layers that only one adapter changes."""
    one, two = adapter(form(0, 3), update(5, path="model.layers.1.mlp")), adapter(form(1, 2))
    found = merge_adapters({"one": one, "two": two}, {"one": 0.8, "two": -1.5}, how)
    new, first, second = deltas(found.exchange), deltas(one), deltas(two)
    assert new.keys() == first.keys()
    for path in new:
        wanted = 0.8 * first[path] - 1.5 * second.get(path, torch.zeros(()))
        assert close(new[path], wanted)
    assert found.lost < 1e-6


def test_concatenation_needs_no_rounding_where_scales_are_powers_of_two() -> None:
    one, two = update(0, 4, alpha=8.0), update(1, 4, alpha=2.0)
    found = merge_adapters({"one": adapter(one), "two": adapter(two)}, {"one": 1, "two": -2}, recipe("concatenation"))
    assert torch.equal(delta(found.exchange.updates[0]).float(), (delta(one) - 2 * delta(two)).float())
    assert (found.exchange.updates[0].rank, found.lost) == (8, 0.0)


def test_concatenation_never_exceeds_the_rank_that_a_matrix_can_have() -> None:
    adapters = {str(seed): adapter(update(seed, 6)) for seed in range(3)}
    found = merge_adapters(adapters, dict.fromkeys(adapters, 1.0), recipe("concatenation"))
    assert found.exchange.updates[0].rank == 10 and found.lost < 1e-6


def test_a_truncated_sum_is_the_nearest_and_says_how_far_it_is() -> None:
    adapters = three()
    found = merge_adapters(adapters, dict.fromkeys(adapters, 1.0), recipe("svd", rank=4))
    wanted = sum(delta(each.updates[0]) for each in adapters.values())
    values = torch.linalg.svdvals(wanted)
    assert found.lost == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-5)
    got = delta(found.exchange.updates[0])
    assert found.lost == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-5)
    assert merge_adapters(adapters, dict.fromkeys(adapters, 1.0), recipe("svd")).exchange.updates[0].rank == 3


def test_linear_says_how_much_of_it_nobody_trained() -> None:
    one, two = update(0), update(1)
    found = merge_adapters({"one": adapter(one), "two": adapter(two)}, {"one": 1.0, "two": 1.0}, recipe("linear"))
    wanted, got = delta(one) + delta(two), delta(found.exchange.updates[0])
    assert found.lost == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-5)
    assert found.lost > 0.5


@pytest.mark.parametrize("election", ["mass", "frequency"])
def test_ties_of_updates_that_agree_is_their_mean(election: str) -> None:
    one = update(0)
    twice = replace(one, alpha=2 * one.alpha)
    both = {"a": adapter(one), "b": adapter(twice)}
    assert close(made(recipe("ties", density=1.0, election=election), {"a": 1, "b": 1}, both), 1.5 * delta(one))


@pytest.mark.parametrize("election", ["mass", "frequency"])
def test_ties_is_what_its_paper_says_entry_by_entry(election: str) -> None:
    adapters, weights, density = three(), {"one": 1.0, "two": 1.0, "three": -0.5}, 0.4
    found = made(recipe("ties", density=density, election=election, rank=FULL), weights, adapters)
    trimmed = []
    for name, each in adapters.items():
        whole = delta(each.updates[0]).flatten().tolist()
        least = sorted(map(abs, whole), reverse=True)[round(density * len(whole)) - 1]
        trimmed.append([weights[name] * value if abs(value) >= least else 0.0 for value in whole])
    for got, values in zip(found.flatten().tolist(), zip(*trimmed, strict=True), strict=True):
        votes = sum((value > 0) - (value < 0) for value in values)
        elected = votes if election == "frequency" and votes else sum(values)
        agreeing = [value for value in values if value * elected > 0]
        assert got == pytest.approx(sum(agreeing) / max(len(agreeing), 1), abs=1e-4)


def test_dropped_entries_are_zero_and_the_others_are_scaled_up() -> None:
    one = update(0)
    found = made(recipe("dare", density=0.25, rank=FULL), {"one": 1.0}, {"one": adapter(one)})
    stays = found.abs() > 1e-4
    assert close(found[stays], 4 * delta(one)[stays], 1e-5)
    assert 0.1 < stays.double().mean() < 0.4


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_the_expectation_of_dare_is_the_weighted_sum(density: float) -> None:
    adapters, weights, draws = three(), {"one": 1.0, "two": 0.5, "three": -1.0}, 300
    wanted = sum(weights[name] * delta(each.updates[0]) for name, each in adapters.items())
    found = [made(recipe("dare", density=density, seed=n, rank=FULL), weights, adapters) for n in range(draws)]
    squares = sum((weights[name] * delta(each.updates[0])).square() for name, each in adapters.items())
    deviation = (squares * (1 - density) / density / draws).sqrt()  # of the mean of that many draws
    assert float(((torch.stack(found).mean(0) - wanted) / deviation).abs().max()) < 4.5


def test_a_seed_tells_what_is_dropped() -> None:
    weights = {"one": 1.0, "two": 1.0, "three": 1.0}
    found = [made(recipe("dare", density=0.5, seed=seed, rank=FULL), weights) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not close(found[0], found[2], 0.1)


ORACLES = [
    ("linear", {}, "linear", {}, [0.7, -1.2]),
    ("concatenation", {}, "cat", {}, [0.7, -1.2]),
    ("svd", {"rank": 3}, "svd", {"svd_rank": 3}, [0.7, -1.2]),
    ("ties", {"density": 0.25, "rank": 32}, "ties_svd", {"svd_rank": 32, "density": 0.25}, [0.7, 0.7]),
]


@pytest.mark.parametrize(("ours", "options", "theirs", "fields", "weights"), ORACLES)
def test_peft_combines_to_the_same(ours: str, options: Any, theirs: str, fields: Any, weights: list[float]) -> None:
    model, names = tiny("llama"), ("one", "two")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    wrapped: Any = get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    wrapped.add_weighted_adapter(list(names), weights, "both", theirs, **fields)
    layers = {path: module for path, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    adapters = {name: adapter(*(_of_peft(path, layer, name) for path, layer in layers.items())) for name in names}
    found = merge_adapters(adapters, dict(zip(names, weights, strict=True)), recipe(ours, **options))
    for path, whole in deltas(found.exchange).items():
        wanted = layers[path].get_delta_weight("both").double()
        assert close(whole if path.endswith("q_proj") else whole.T, wanted, 2e-5)


def _of_peft(path: str, layer: Any, name: str) -> Update:
    if name in layer.lora_A:
        a, b, form = layer.lora_A[name].weight, layer.lora_B[name].weight, "linear"
    else:
        a, b, form = layer.lora_embedding_A[name], layer.lora_embedding_B[name], "embedding"
    return Update(path, value_of(a.detach().clone()), value_of(b.detach().clone()), 12.0, form=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_does_with_the_written_sum_what_it_does_with_the_mixture(family: str, tmp_path: Path) -> None:
    model, weights = tiny(family), {"one": 0.7, "two": -0.4}
    for name in weights:
        lk.attach(model, lk.LoRA(rank=3), name=name)
        for parameter in lk.parameters(model, name):
            torch.nn.init.normal_(parameter, std=0.3)
        lk.save(model, name, tmp_path / name)
    adapters = {name: peft.read(tmp_path / name, Told()) for name in weights}
    peft.write(merge_adapters(adapters, weights, recipe("concatenation")).exchange, tmp_path / "sum", Told())
    peft.write(compress(adapters["one"], keeping(1.0)).exchange, tmp_path / "same", Told())
    lk.load(model, tmp_path / "sum", name="sum")
    lk.load(model, tmp_path / "same", name="same")
    for what, wanted in (("sum", weights), ("same", "one")):
        with torch.no_grad(), lk.use(model, wanted):
            before = model(tokens(model)).logits
        with torch.no_grad(), lk.use(model, what):
            assert torch.allclose(model(tokens(model)).logits, before, atol=1e-5 * float(before.abs().max()))


def test_fused_layers_keep_their_parts_or_are_taken_whole_where_these_differ() -> None:
    one, two, three = (adapter(each) for each in (fused(0), fused(1), fused(2, roles=("attn.q", "attn.k"))))
    same = merge_adapters({"one": one, "two": two}, {"one": 1, "two": 1}, recipe("svd", rank=2))
    assert [each.name for each in same.matrices] == [f"{FUSED}[attn.q]", f"{FUSED}[attn.v]"]
    assert [each.rank for each in same.matrices] == [2, 2]
    mixed = merge_adapters({"one": one, "three": three}, {"one": 1, "three": 1}, recipe("concatenation"))
    assert [each.name for each in mixed.matrices] == [FUSED]
    assert close(delta(mixed.exchange.updates[0]), delta(one.updates[0]) + delta(three.updates[0]))


@pytest.mark.parametrize("how", [recipe("svd"), recipe("ties", density=1.0)], ids=str)
def test_biases_are_added_up(how: Recipe) -> None:
    one, two = (update(seed, alpha=3.0 * (seed + 1), shift=value_of(torch.full((12,), 1.0 + seed))) for seed in (0, 1))
    found = merge_adapters({"one": adapter(one), "two": adapter(two)}, {"one": 0.5, "two": -1.0}, how)
    (only,) = found.exchange.updates
    assert only.shift is not None
    assert torch.allclose(only.scale * only.shift.read(), torch.full((12,), 0.5 * 1.0 * 1.0 - 1.0 * 2.0 * 2.0))


def test_what_cancels_is_a_zero_update() -> None:
    one = adapter(update(0))
    found = merge_adapters({"a": one, "b": one}, {"a": 1.0, "b": -1.0}, recipe("svd"))
    assert not delta(found.exchange.updates[0]).any() and found.exchange.updates[0].rank == 1
    assert found.lost == 0


def test_stacked_experts_get_one_rank_where_one_of_them_cancels() -> None:
    one, two = FORMS[3](0), FORMS[3](1)
    b = two.b.read()
    b[1], a = one.b.read()[1], two.a.read()
    a[1] = one.a.read()[1]
    other = replace(two, a=value_of(a), b=value_of(b))
    found = merge_adapters({"one": adapter(one), "two": adapter(other)}, {"one": 1, "two": -1}, recipe("svd", rank=6))
    assert found.exchange.updates[0].a.shape == (3, 6, 10)
    assert close(delta(found.exchange.updates[0]), delta(one) - delta(other))


def test_the_files_dtype_is_kept_and_its_rounding_told() -> None:
    one, two = update(0, dtype=torch.bfloat16), update(1, dtype=torch.bfloat16)
    both = {"one": adapter(one), "two": adapter(two)}
    found = merge_adapters(both, {"one": 1.0, "two": 0.3}, recipe("concatenation"))
    (only,) = found.exchange.updates
    wanted = delta(one) + 0.3 * delta(two)
    assert {value.dtype for value in only.values} == {torch.bfloat16}
    assert found.lost == pytest.approx(float((delta(only) - wanted).norm() / wanted.norm()), rel=1e-6)
    assert 1e-4 < found.lost < 1e-2
    exact = merge_adapters(both, {"one": 1.0, "two": 0.3}, recipe("concatenation"), torch.float32)
    assert exact.exchange.updates[0].a.dtype == torch.float32 and exact.lost < 1e-6


def test_heads_are_taken_where_adapters_agree() -> None:
    head, other = {"head.weight": value_of(torch.ones(2))}, {"head.weight": value_of(torch.zeros(2))}
    one, two, three = (adapter(update(n), whole=whole) for n, whole in enumerate((head, {}, head)))
    found = merge_adapters({"one": one, "two": two, "three": three}, {"one": 1, "two": 1, "three": 0.5}, recipe("svd"))
    assert torch.equal(found.exchange.whole["head.weight"].read(), torch.ones(2))
    assert found.notes and "three" in found.notes[0]
    four = adapter(update(4), whole=other)
    with pytest.raises(BadMethod, match=r"one and four have different values of head\.weight"):
        merge_adapters({"one": one, "four": four}, {"one": 1, "four": 1}, recipe("svd"))
    with pytest.raises(BadMethod, match=r"four has head\.weight .* no negative weight"):
        merge_adapters({"two": two, "four": four}, {"two": 1, "four": -1}, recipe("svd"))
    assert not merge_adapters({"two": two, "four": four}, {"two": 1, "four": 0}, recipe("svd")).exchange.whole


def sampled(value: float, shape: tuple[int, ...] = (2, 2), **fields: Any) -> dict[str, Any]:
    """A header with the fingerprint of a base of one weight."""
    raw = torch.full(shape, value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    sample = {"shape": list(shape), "bf16": base64.b64encode(raw).decode(), **fields}
    return {"base": {"architecture": "Llama", "labels": 0, "samples": {LAYER: sample}}}


def both(one: dict[str, Any], two: dict[str, Any]) -> Merged:
    adapters = {"one": adapter(update(0), **one), "two": adapter(update(1), **two)}
    return merge_adapters(adapters, {"one": 1, "two": 1}, recipe("svd"))


def test_bases_are_told_apart_by_weights_or_else_by_name() -> None:
    with pytest.raises(BadMethod, match="one belongs to the base meta/llama, two to meta/gemma"):
        both({"base": "meta/llama"}, {"base": "meta/gemma"})
    with pytest.raises(BadMethod, match="bases with other weights"):
        both({"base": "same", "header": sampled(1.0)}, {"base": "same", "header": sampled(1.1)})
    with pytest.raises(BadMethod, match="bases with other weights"):
        both({"header": sampled(1.0)}, {"header": sampled(1.0, (4, 1))})
    adapters = {str(n): adapter(update(n), base=base) for n, base in enumerate((None, "llama", "gemma"))}
    with pytest.raises(BadMethod, match="1 belongs to the base llama, 2 to gemma"):
        merge_adapters(adapters, dict.fromkeys(adapters, 1.0), recipe("svd"))
    both({"base": "meta/llama"}, {"base": "folder/of/mine/Llama/"})
    both({"base": "meta/llama"}, {"base": None})
    both({"base": "one/name", "header": sampled(1.0)}, {"base": "other", "header": sampled(1.004)})
    both({"header": sampled(1.0)}, {"header": sampled(1.1, bits=4.0)})
    both({"header": {"base": {"samples": "damaged"}}}, {"header": sampled(1.0)})


def test_adapters_that_do_not_belong_together_are_told_with_every_difference() -> None:
    one = adapter(update(0), update(1, path="other"))
    two = adapter(replace(update(0), a=value_of(torch.ones(3, 7))), replace(convolution(), path="other"))
    with pytest.raises(BadMethod) as error:
        merge_adapters({"one": one, "two": two}, {"one": 1, "two": 1}, recipe("concatenation"))
    told = (f"{LAYER} is 12 x 10 in one and 12 x 7 in two", "other is 12 x 10 in one", "12 x 2 x 3 x 2 (convolution)")
    assert all(part in str(error.value) for part in told)


@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 1.0, "two": 2.0, "more": 1.0}])
def test_every_adapter_has_one_weight(weights: dict[str, float]) -> None:
    with pytest.raises(BadMethod, match="every adapter needs a weight"):
        merge_adapters({"one": adapter(update(0)), "two": adapter(update(1))}, weights, recipe("svd"))


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_all_zero(weight: float) -> None:
    with pytest.raises(BadMethod, match="finite weights"):
        merge_adapters({"one": adapter(update(0))}, {"one": weight}, recipe("svd"))


def test_linear_refuses_other_ranks() -> None:
    with pytest.raises(BadMethod, match=f"{LAYER} have the ranks 2 and 3"):
        merge_adapters({"a": adapter(update(0, 3)), "b": adapter(update(1, 2))}, {"a": 1, "b": 1}, recipe("linear"))


def test_a_layer_that_is_changed_twice_is_refused() -> None:
    with pytest.raises(BadAdapterFile, match=r"^mine cannot.*changes .*q_proj twice"):
        merge_adapters({"mine": adapter(update(0), update(1))}, {"mine": 1.0}, recipe("svd"))


def test_dora_is_refused_by_name() -> None:
    scaled = adapter(update(0, magnitude=value_of(torch.ones(12))))
    with pytest.raises(BadAdapterFile, match=r"^mine cannot.*DoRA"):
        merge_adapters({"mine": scaled}, {"mine": 1.0}, recipe("svd"))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ties", {"density": 0.0}, "density of 0"),
        ("dare", {"density": 1.5}, "density of 1.5"),
        ("svd", {"rank": 0}, "rank 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: Any, told: str) -> None:
    with pytest.raises(BadMethod, match=told):
        recipe(name, **options)


def test_unknown_recipes_and_options_are_told_with_what_there_is() -> None:
    with pytest.raises(UnknownName, match="'tie'; did you mean ties"):
        recipe("tie")
    with pytest.raises(UnknownName, match="linear has no option 'density'"):
        recipe("linear", density=0.5)
    with pytest.raises(UnknownName, match="by 'weight'; There is: frequency, mass"):
        recipe("ties", election="weight")
