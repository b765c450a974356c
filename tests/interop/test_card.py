"""A card says what the adapter's files say, in the hub's words, and nothing of the machine; its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

import lorakit as lk
from lorakit.core import files
from lorakit.errors import LorakitError
from lorakit.interop.card import Told, base_name, is_unedited, shared, write
from tests.data.conftest import made
from tests.tiny import tiny

RESULTS = {"base": {"accuracy": 0.5, "perplexity": float("inf")}, "adapter": {"accuracy": 0.75}, "steps": 4}
RUN = {
    "run": {
        "base": "owner/base",
        "out": "out/reviews",
        "data": {"source": "reviews", "template": "a | b\n`{text}`", "label": None, "train_examples": 8},
        "train": {"learning_rate": 0.001, "compile": False},
    },
    "versions": {"lorakit": "0.1.0", "torch": "2.13.0"},
}


def saved(folder: Path, method: lk.Method | None = None, family: str = "llama", **options: Any) -> files.Contents:
    model = tiny(family, **options)
    lk.attach(model, method or lk.LoRA(rank=2, targets=("attn.q", "attn.v")), name="a")
    lk.save(model, "a", folder)
    return files.read(folder)


def card(contents: files.Contents, **more: Any) -> tuple[dict[str, Any], str]:
    """The metadata as the hub reads it, and the text."""
    text = write(Told(**{"repo": "owner/reviews", "base": "owner/base", "contents": contents} | more))
    return ModelCard(text).data.to_dict(), text


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a section's table by their first cell."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("` ") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return {first: rest for first, *rest in rows[2:]}


def test_the_hub_reads_base_library_task_and_measures(tmp_path: Path) -> None:
    told, _ = card(saved(tmp_path / "a"), run=RUN, results=RESULTS, license="mit")
    (index,) = told.pop("model-index")
    assert told == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "metrics": ["accuracy"],
        "pipeline_tag": "text-generation",
        "tags": ["lorakit", "lora"],
    }
    (result,) = index["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert result["dataset"] == {"name": "reviews", "type": "reviews"}


def test_people_read_method_plan_data_and_both_sides(tmp_path: Path) -> None:
    contents = saved(tmp_path / "a")
    _, text = card(contents, run=RUN, results=RESULTS, curve="loss.png")
    assert table(text, "Results on the test examples")["accuracy"] == ["0.5", "0.75"]
    assert table(text, "Method")["targets"] == ['["attn.q", "attn.v"]']
    plan = table(text, "Plan")
    assert {role: row[:2] for role, row in plan.items()} == {"attn.q": ["2", "2"], "attn.v": ["2", "2"]}
    assert sum(int(row[2]) for row in plan.values()) == sum(value.numel() for value in contents.tensors.values())
    assert table(text, "Data") == {
        "source": ["reviews"],
        "template": [r"a \| b\n`{text}"],  # its outer quotes are taken off
        "train_examples": ["8"],
    }
    assert table(text, "Training") == {"learning_rate": ["0.001"], "steps": ["4"]}
    assert "](loss.png)" in text
    assert "torch 2.13.0" in text


def test_an_adapter_without_a_run_has_a_card_too(tmp_path: Path) -> None:
    told, text = card(saved(tmp_path / "a"))
    assert "model-index" not in told
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["Method", "Plan", "Use"]


@pytest.mark.parametrize(
    ("source", "known"),
    [("owner/rows", ["owner/rows"]), ("reviews", None), ("rows.csv", None), ("far/off/rows.jsonl", None)],
)
def test_only_a_data_set_of_the_hub_is_named_as_one(source: str, known: object, tmp_path: Path) -> None:
    told, _ = card(saved(tmp_path / "a"), run=shared({"run": {"data": {"source": source}}}, "owner/base"))
    assert told.get("datasets") == known


def test_a_fused_layer_is_one_row_of_all_its_roles(tmp_path: Path) -> None:
    _, text = card(saved(tmp_path / "a", family="gpt2"))
    assert table(text, "Plan")["attn.q + attn.v"][:2] == ["2", "2"]


def test_a_trained_bias_belongs_to_its_layer_and_a_combination_tells_its_parts(tmp_path: Path) -> None:
    _, text = card(saved(tmp_path / "a", lk.LoRA(rank=2, targets=("attn.q",), bias="lora_only"), family="bert"))
    assert list(table(text, "Plan")) == ["attn.q + bias"]
    parts = (lk.LoRA(rank=2, targets=("attn.q",)), lk.LoRA(rank=3, targets=("attn.v",)))
    _, text = card(saved(tmp_path / "b", lk.Combine(parts=parts)))
    assert table(text, "Method")["part 2: rank"] == ["3"]
    assert [row[1] for row in table(text, "Plan").values()] == ["2", "3"]


def test_what_peft_cannot_read_is_not_called_peft(tmp_path: Path) -> None:
    told, text = card(saved(tmp_path / "a", lk.BitFit(), family="bert"))
    assert told["library_name"] == "lorakit"
    assert "peft" not in text


def test_a_folder_of_pefts_own_is_told_from_its_config(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    told, text = card(files.read(tmp_path / "a"))
    assert (told["library_name"], told["tags"]) == ("peft", ["lora"])
    assert table(text, "Method")["r"] == ["3"]


def test_the_same_run_gives_the_same_card_and_any_edit_shows(tmp_path: Path) -> None:
    contents = saved(tmp_path / "a")
    _, text = card(contents, run=RUN, results=RESULTS)
    assert text == card(contents, run=RUN, results=RESULTS)[1]
    assert is_unedited(text)
    assert not any(is_unedited(edited) for edited in (text.replace("0.75", "0.95"), "More. " + text, text + "More."))


@pytest.mark.parametrize("labels", [None, 3])
def test_the_code_in_the_card_runs(labels: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = lk.LoRA(rank=2, targets=("attn.q",), train=("score",) if labels else ())
    contents = saved(tmp_path / "reviews", method, labels=labels, vocab_size=400)
    saved(tmp_path / "owner" / "reviews", method, labels=labels, vocab_size=400)
    tiny("llama", labels=labels, vocab_size=400).save_pretrained(tmp_path / "owner" / "base")
    made().save_pretrained(tmp_path / "owner" / "base")
    blocks = re.findall(r"```python\n(.*?)```", card(contents)[1], re.DOTALL)
    monkeypatch.chdir(tmp_path)  # where the hub's names are folders
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for block, names in zip(blocks, (ours, theirs), strict=True):
        exec(block, names)
    assert "reviews" in str(lk.summary(ours["model"]))
    assert isinstance(theirs["model"], PeftModel)


@pytest.mark.slow
def test_the_code_of_a_packaged_base_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit import models

    model, _ = models.load("minilm-l6")
    lk.attach(model, lk.LoRA(rank=2), name="a")
    for folder in ("reviews", "owner/reviews"):
        lk.save(model, "a", tmp_path / folder)
    told, text = card(files.read(tmp_path / "reviews"), base="minilm-l6")
    assert "base_model" not in told
    assert "pip install" in text
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})


def test_nothing_of_this_machine_is_shared(tmp_path: Path) -> None:
    place = str(tmp_path)
    data = {"source": f"{place}/rows.csv", "test": "~/test.csv", "path": None, "template": "/think {text}"}
    told = {"run": {"base": f"{place}/base", "out": f"{place}/out/", "data": data}, "versions": {"torch": "2"}}
    assert shared(told, "owner/base") == {
        "run": {
            "base": "owner/base",
            "out": "out",
            "data": {"source": "rows.csv", "test": "test.csv", "path": None, "template": "/think {text}"},
        },
        "versions": {"torch": "2"},
    }
    assert told["run"]["out"] == f"{place}/out/"
    assert shared({}, "owner/base") == {}
    as_it_is = {"run": {"base": "gpt2", "out": "reviews", "data": {"source": "owner/rows"}}}
    assert shared(as_it_is, "gpt2") == as_it_is


@pytest.mark.parametrize("name", ["../base", "C:\\base", "model.gguf", "a/b/c", "~/base", "here", "no such name", None])
def test_a_base_that_others_cannot_find_is_refused(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(LorakitError, match="give its name at the hub with --base"):
        base_name(name, "out/reviews")


def test_a_base_that_others_find_is_taken() -> None:
    assert [base_name(name, "x") for name in ("owner/base", "gpt2", "smollm2_135m")] == [
        "owner/base", "gpt2", "smollm2_135m",
    ]  # fmt: skip
