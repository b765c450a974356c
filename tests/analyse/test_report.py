"""A report of adapters as they come: several stacks of blocks, experts, dead roles, nothing in common, no layers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import torch

from lorakit.analyse import Effect, HeatMap, LayerEffect, Lines, Page, Study, Table, TokenEffect, render, report
from lorakit.core.exchange import Exchange, Form, Update
from lorakit.core.values import value_of

NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})


def update(
    path: str, seed: int = 0, *, rank: int = 2, out: int = 6, dead: bool = False, form: Form = "linear"
) -> Update:
    """An update of a layer with 8 inputs; of three experts where they are asked."""
    generator = torch.Generator().manual_seed(seed)
    experts = (3,) if form == "experts" else ()
    a = torch.randn(*experts, rank, 8, generator=generator)
    b = torch.randn(*experts, out, rank, generator=generator) * (not dead)
    return Update(path, value_of(a), value_of(b), alpha=float(rank), form=form)


def adapter(*updates: Update) -> Exchange:
    return Exchange("peft", updates)


def norm(own: Update) -> float:
    return float((own.b.read() @ own.a.read()).norm())


def titles(page: Page) -> list[str]:
    return [figure.title for section in page.sections for figure in section.figures]


def rows(page: Page, title: str) -> list[dict[str, str]]:
    """The numbers of a figure, which can be drawn."""
    render(page)
    figure = next(each for section in page.sections for each in section.figures if each.title == title)
    return list(csv.DictReader(io.StringIO(figure.csv())))


def test_an_encoder_and_a_decoder_are_told_apart() -> None:
    ups = [update(f"{stack}.block.{n}.layer.0.q", seed) for n in (0, 1)
           for seed, stack in enumerate(("encoder", "decoder"), 2 * n)]  # fmt: skip
    told = rows(report(Study({"a": adapter(*ups)})), "Norm of the updates")
    found = {(row["layer"], row["role"]): float(row["‖ΔW‖_F"]) for row in told}
    assert found[("0", "encoder.block layer.0.q")] == pytest.approx(norm(ups[0]))
    assert found[("1", "decoder.block layer.0.q")] == pytest.approx(norm(ups[3]))


def test_what_lies_in_no_layer_has_a_row_and_a_name_of_its_own() -> None:
    ups = [update("head"), update("vision.proj", 1), update("text.proj", 2), update("layers.0.q", 3)]
    told = rows(report(Study({"a": adapter(*ups)})), "Norm of the updates")
    found = {(row["layer"], row["role"]): float(row["‖ΔW‖_F"]) for row in told if row["‖ΔW‖_F"] != "nan"}
    names = [("in none", "head"), ("in none", "vision proj"), ("in none", "text proj"), ("0", "q")]
    assert found == pytest.approx({name: norm(own) for name, own in zip(names, ups, strict=True)})


def test_experts_are_shown_one_by_one() -> None:
    one, two = (adapter(update("layers.0.experts.up", seed, form="experts"), update("layers.0.q", seed))
                for seed in (0, 1))  # fmt: skip
    page = report(Study({"a": one, "b": two}))
    assert {row["line"] for row in rows(page, "Singular values, layer 0")} == {
        f"{name}, {role}" for name in "ab" for role in (*(f"experts.up[{n}]" for n in range(3)), "q")
    }
    assert {row["panel"] for row in rows(page, "A of a and b, layer 0")} == {"experts.up[0]", "q", "random"}


@pytest.mark.parametrize("everywhere", [True, False])
def test_dead_roles_have_no_directions_and_no_patterns(everywhere: bool) -> None:
    ups = [update(f"layers.{n}.{role}", n, dead=everywhere or role == "q") for n in range(5) for role in "qv"]
    page = report(
        Study({"a": adapter(*ups), "b": adapter(*ups)}, {each.path: value_of(torch.eye(6, 8)) for each in ups})
    )
    assert rows(page, "The adapters")[0]["dead matrices"].startswith("10: " if everywhere else "5: ")
    assert ("v of a over depth" in titles(page)) is not everywhere
    assert "q of a over depth" not in titles(page)


def test_adapters_that_change_nothing_in_common_are_still_told_of() -> None:
    page = report(Study({"a": adapter(update("layers.0.q")), "b": adapter(update("layers.1.v"))}))
    assert [section.title for section in page.sections] == [
        "How much is changed, and where",
        "Which of the rank is used",
    ]
    three = {
        "a": adapter(update("layers.0.q")),
        "b": adapter(update("layers.0.q", 1)),
        "c": adapter(update("layers.1.v")),
    }
    assert [row["pair"] for row in rows(report(Study(three)), "Pairs of adapters")] == ["a and b"]


def test_two_adapters_are_compared_where_both_are() -> None:
    one = adapter(*(update(f"layers.{n}.q", n) for n in range(10)))
    two = adapter(*(update(f"layers.{n}.q", n) for n in range(8, 12)))
    assert "A of a and b, layer 9" in titles(report(Study({"a": one, "b": two})))


def test_chance_is_that_of_each_width_and_rank() -> None:
    def made(seed: int) -> Exchange:
        return adapter(*(update(f"layers.{n}.{role}", seed + n, rank=rank, out=out)
                         for n in range(2) for role, rank, out in (("q", 2, 6), ("v", 3, 4))))  # fmt: skip

    page = report(Study({"a": made(0), "b": made(9)}))
    told = rows(page, "Directions of A that a and b share, over depth")
    chance = {row["line"]: float(row["φ"]) for row in told if "chance" in row["line"]}
    assert chance == {"q, all by chance": 2 / 8, "v, all by chance": 3 / 8}
    panels = {row["panel"] for row in rows(page, "B of a and b, layer 1")}
    assert panels == {"q", "v", "random, as q", "random, as v"}
    by_layer = {row["panel"] for row in rows(page, "A and B of a and b by layer: q")}
    assert by_layer == {*(f"{side}, layer {n}" for side in "AB" for n in (0, 1)), "A, random", "B, random"}


def test_ranks_of_weights_and_wasted_ranks_are_those_of_dense_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    w_OI, own = torch.randn(6, 8, generator=generator), update("layers.0.q", rank=4)
    page = report(Study({"a": adapter(own)}, {"layers.0.q": value_of(w_OI)}))
    [told] = rows(page, "Ranks of the weights, layer 0")
    values = torch.linalg.svdvals(w_OI.double())
    shares = values / values.sum()
    effective = math.exp(-float((shares * shares.log()).sum()))
    assert float(told["stable rank"]) == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-6)
    assert float(told["effective rank, at least"]) == float(told["effective rank, at most"])
    assert float(told["effective rank, at least"]) == pytest.approx(effective, rel=1e-6)
    assert told["numerical rank, at least"] == told["numerical rank, at most"] == "6"
    energies = torch.linalg.svdvals((own.b.read() @ own.a.read()).double()).square().cumsum(0)
    needed = int((energies < 0.99 * energies[-1]).sum()) + 1
    assert [float(row["ranks"]) for row in rows(page, "Wasted ranks")] == [4 - needed]


def test_layers_of_one_last_name_and_tokens_of_one_text_are_told_apart() -> None:
    ups = [update(f"layer.0.{role}.dense", out=6) for role in ("attention.output", "intermediate")]
    layers = tuple(LayerEffect(up.path, 0, 1, value, torch.ones(6), torch.ones(6), NOTHING)
                   for up, value in zip(ups, (0.25, 0.5), strict=True))  # fmt: skip
    tokens = TokenEffect(torch.tensor([7, 9]), torch.ones(2), torch.tensor([1.0, 2.0]), None)
    study = Study({"a": adapter(*ups)}, effects={"a": Effect(layers, (), (), tokens)}, token=lambda _: "�")
    page = report(study)
    local = {row["line"]: float(row["‖Δ‖ / ‖y‖"]) for row in rows(page, "What each layer adds")}
    assert local == {"a, attention.output.dense": 0.25, "a, intermediate.dense": 0.5}
    assert [row["token"] for row in rows(page, "Tokens after which a changes most")] == ["� (9)", "� (7)"]
    assert "Drift of the hidden states" not in titles(page)


def test_no_figure_is_empty() -> None:
    ups = [update(f"layers.{n}.q", n, dead=n % 2 == 1) for n in range(6)] + [update("head", 9)]
    page = report(
        Study({"a": adapter(*ups), "b": adapter(*ups)}, {each.path: value_of(torch.eye(6, 8)) for each in ups})
    )
    for section in page.sections:
        for figure in section.figures:
            match figure:
                case HeatMap():
                    assert all(bool(grid.isfinite().any()) for grid in figure.panels.values()), figure.title
                case Table():
                    assert figure.rows, figure.title
                case Lines():
                    assert figure.lines, figure.title
                    assert figure.at, figure.title
