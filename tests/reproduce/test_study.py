"""A study gathers adapters of any format and their base, and its report says of them what the mathematics says."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit import interop, models
from lorakit.analyse import html
from lorakit.analyse.page import Figure, Page
from lorakit.analyse.report import report
from lorakit.analyse.study import Study
from lorakit.data import Data, open_data
from lorakit.errors import BadAdapterFile, BadMethod, BadModel, LorakitError
from lorakit.reproduce.measures import Evaluate
from lorakit.reproduce.study import Asked, gather, labels, losses
from tests.laws.cases import scramble
from tests.reproduce.small import write
from tests.tiny import tiny

METHODS = {"one": dict(rank=2, targets="linear"), "two": dict(rank=4, targets=("attn.q", "attn.v", "mlp.down"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it, one of them as a file of another format too, and a merged model."""
    folder = tmp_path_factory.mktemp("study")
    write(folder)
    for seed, (name, fields) in enumerate(METHODS.items()):
        model, _ = models.load(str(folder / "base"))
        lk.attach(model, lk.LoRA(**fields), name=name)
        torch.manual_seed(seed)
        scramble(model, name)
        lk.save(model, name, folder / name)
        if name == "one":
            lk.merge(model, name)
            model.save_pretrained(folder / "merged")
    return folder


def found(page: Page, title: str) -> Figure:
    """The figure of a title."""
    return next(each for section in page.sections for each in section.figures if each.title == title)


def rows(figure: Figure) -> list[dict[str, str]]:
    """A figure's numbers."""
    return list(csv.DictReader(io.StringIO(figure.csv())))


@pytest.fixture(scope="module")
def study(place: Path) -> Study:
    data = open_data(Data(source=str(place / "rows.csv"), context="text", label="verdict", test_examples=3))
    adapters = [str(place / name) for name in METHODS]
    return gather(Asked(adapters=adapters, base=str(place / "base"), examples=data.test))


def test_a_report_has_a_section_for_each_question(study: Study, tmp_path: Path) -> None:
    page = report(study)
    assert [section.title for section in page.sections] == [
        "How much is changed, and where",
        "Which of the rank is used",
        "Directions that adapters share",
        "How adapters meet",
        "Updates against weights",
        "Intruder dimensions",
        "What the adapters do on text",
        "Where base and adapter disagree",
    ]
    assert all(section.words.strip() and section.figures for section in page.sections)
    html.write(page, tmp_path / "report.html")
    assert html.render(report(study)) == (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_a_base_what_needs_none_is_there(place: Path) -> None:
    page = report(gather(Asked(adapters=[str(place / "one")])))
    titles = [section.title for section in page.sections]
    assert titles == ["How much is changed, and where", "Which of the rank is used"]


def test_table_7_is_that_of_dense_matrices(study: Study, place: Path) -> None:
    model, _ = models.load(str(place / "base"))
    path = f"model.layers.{study.middle}.self_attn.q_proj"
    w_OI = model.get_submodule(path).weight.detach().double()
    a_RI, b_OR = next(each for each in study.matrices["two"] if each.path == path).read()
    delta_OI = (b_OR @ a_RI).double()
    left_OR, _, right_RI = torch.linalg.svd(delta_OI)
    told = rows(found(report(study), f"Table 7, layer {study.middle}"))
    row = next(row for row in told if row["adapter"] == "two" and row["matrix"] == "self_attn.q_proj")
    inside = float((left_OR[:, :4].T @ w_OI @ right_RI[:4].T).norm())
    expected = {
        "‖UᵀWV‖ of ΔW": inside,
        "of W": float(torch.linalg.svdvals(w_OI)[:4].norm()),
        "of random": float(w_OI.norm()) * 4 / math.sqrt(w_OI.numel()),
        "‖W‖_F": float(w_OI.norm()),
        "‖ΔW‖_F": float(delta_OI.norm()),
        "amplification": float(delta_OI.norm()) / inside,
    }
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-4)


def test_a_merged_model_is_the_adapter_that_was_merged(study: Study, place: Path) -> None:
    whole = gather(Asked(adapters=[str(place / "merged"), str(place / "one")], base=str(place / "base"), rank=2))
    table = rows(found(report(whole), "Pairs of adapters"))
    assert float(table[0]["cosine"]) == pytest.approx(1.0, abs=1e-4)
    assert table[0]["matrices of one alone"] == "0"
    with pytest.raises(BadAdapterFile, match="whole model; name the base"):
        gather(Asked(adapters=[str(place / "merged")]))
    with pytest.raises(BadModel, match="the same weights"):
        gather(Asked(adapters=[str(place / "base")], base=str(place / "base")))


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    tiny("llama", hidden_size=16, vocab_size=400).save_pretrained(tmp_path / "small")
    study = gather(Asked(adapters=[str(place / "one")], base=str(tmp_path / "small")))
    with pytest.raises(BadAdapterFile, match="in this base, and"):
        report(study)
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BadAdapterFile, match=r"its base is a LlamaForCausalLM, but .* is of the type gpt2"):
        gather(Asked(adapters=[str(place / "one")], base=str(tmp_path / "gpt2")))
    interop.convert(place / "one", tmp_path / "nameless", "portable")
    with pytest.raises(BadAdapterFile, match="has no matrix"):
        report(gather(Asked(adapters=[str(tmp_path / "nameless")], base=str(tmp_path / "gpt2"))))


def test_adapters_of_other_shapes_are_refused_before_anything_is_compared(place: Path, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=16, vocab_size=400)
    lk.attach(model, lk.LoRA(rank=2, targets="linear"), name="other")
    lk.save(model, "other", tmp_path / "other")
    with pytest.raises(BadMethod, match="do not belong together"):
        gather(Asked(adapters=[str(place / "one"), str(tmp_path / "other")]))


def test_a_model_that_was_trained_whole_is_told_with_what_is_left_out(
    place: Path, tmp_path: Path, study: Study
) -> None:
    model, _ = models.load(str(place / "base"))
    torch.manual_seed(0)
    deltas = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            deltas[name.removesuffix(".weight")] = torch.randn_like(value) / 100
            value += deltas[name.removesuffix(".weight")]
    model.save_pretrained(tmp_path / "trained")
    examples = [each.example for each in study.disagreements["one"]]
    found = gather(Asked(adapters=[str(tmp_path / "trained")], base=str(place / "base"), rank=4, examples=examples))
    changed = {each.path for each in found.adapters["trained"].updates}
    values = [torch.linalg.svdvals(delta.double()) for path, delta in deltas.items() if path in changed]
    left = math.hypot(*(float(each[4:].norm()) for each in values)) / math.hypot(
        *(float(each.norm()) for each in values)
    )
    assert found.lost["trained"] == pytest.approx(left, rel=1e-3)
    assert "model.embed_tokens" in changed
    assert found.effects["trained"].divergence is not None
    assert f"{100 * left:.2g} % of ‖ΔW‖_F left out" in str(report(found).facts)
    with pytest.raises(BadModel, match="give a rank of 1 or more"):
        gather(Asked(adapters=[str(tmp_path / "trained")], base=str(place / "base"), rank=0))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_is_studied_on_the_model_that_it_was_trained_on(
    family: str, place: Path, tmp_path: Path, study: Study
) -> None:
    tiny(family, vocab_size=400).save_pretrained(tmp_path / "base")
    models.load(str(place / "base"))[1].save_pretrained(tmp_path / "base")
    model, _ = models.load(str(tmp_path / "base"), labels=2)
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="judge")
    scramble(model, "judge")
    lk.save(model, "judge", tmp_path / "judge")
    examples = [each.example for each in study.disagreements["one"]]
    found = gather(Asked(adapters=[str(tmp_path / "judge")], base=str(tmp_path / "base"), examples=examples))
    titles = [section.title for section in report(found).sections]
    assert "Updates against weights" in titles
    assert "What the adapters do on text" in titles
    assert "Where base and adapter disagree" not in titles


def test_an_encoder_with_a_decoder_is_refused_on_text(place: Path, tmp_path: Path, study: Study) -> None:
    model = tiny("t5", vocab_size=400)
    model.save_pretrained(tmp_path / "base")
    models.load(str(place / "base"))[1].save_pretrained(tmp_path / "base")
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q",)), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    asked = Asked(adapters=[str(tmp_path / "a")], base=str(tmp_path / "base"))
    assert report(gather(asked)).sections
    with pytest.raises(BadModel, match="leave the texts out with --examples 0"):
        gather(replace(asked, examples=[study.disagreements["one"][0].example]))


def test_texts_need_a_base_and_names_tell_adapters_apart(study: Study, place: Path) -> None:
    with pytest.raises(LorakitError, match="needs its base"):
        gather(Asked(adapters=[str(place / "one")], examples=[study.disagreements["one"][0].example]))
    with pytest.raises(LorakitError, match="named twice"):
        labels([str(place / "one"), str(place / "one")])


def test_a_fused_layer_is_studied_by_its_roles(tmp_path: Path) -> None:
    model = tiny("gpt2")
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q", "attn.v", "mlp.up")), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    model.save_pretrained(tmp_path / "base")
    page = report(gather(Asked(adapters=[str(tmp_path / "a")], base=str(tmp_path / "base"))))
    table = rows(found(page, "Table 7, layer 1"))
    assert [row["matrix"] for row in table] == ["attn.q", "attn.v", "mlp.c_fc"]
    w_OI = model.state_dict()["transformer.h.1.attn.c_attn.weight"].T.double()
    thirds = {"attn.q": w_OI[:32], "attn.v": w_OI[64:], "mlp.c_fc": None}
    for row in table:
        third = thirds[row["matrix"]]
        assert third is None or float(row["‖W‖_F"]) == pytest.approx(float(third.norm()))


def test_losses_tell_what_was_lost(place: Path) -> None:
    data = open_data(Data(source=str(place / "rows.csv"), context="text", label="verdict", test_examples=4))
    one = interop.read(place / "one")
    same = losses(str(place / "base"), {"before": one, "after": one}, data, Evaluate())
    assert same["before"] == same["after"] != same["base"]
    assert same["before"].keys() == {"loss", "accuracy"}
