"""Each verb on a tiny model: what it leaves behind, what it prints, and one sentence for each mistake."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk
from lorakit.cli import main
from tests.data.conftest import made
from tests.tiny import tiny

WORDS = ("fine", "bad", "film", "good", "the", "a")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base (decoder and encoder), labelled rows, and an adapter trained on them."""
    folder = tmp_path_factory.mktemp("cli")
    for name, family in (("base", "llama"), ("encoder", "bert")):
        tiny(family, vocab_size=400).save_pretrained(folder / name)
        made().save_pretrained(folder / name)
    drawn = random.Random(0)
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "verdict"])
        for number in range(60):
            text = " ".join(drawn.choices(WORDS, k=4))
            rows.writerow([f"{text} {number}", "good" if "good" in text else "bad"])
    assert main(words(folder, "adapter")) == 0
    return folder


def words(folder: Path, out: str, *more: str, base: str = "base") -> list[str]:
    """A short training run's command line."""
    told = ["train", "--base", str(folder / base), "--data", str(folder / "rows.csv"), "--out", str(folder / out)]
    told += ["--data.context", "text", "--data.label", "verdict", "--train.steps", "4", "--train.batch_size", "4"]
    return [*told, "--train.checkpoint_every", "2", *more]


def test_train_leaves_the_adapter_and_all_that_belongs_to_it(place: Path) -> None:
    out = place / "adapter"
    files = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.png", "run.json"} <= files
    results = json.loads((out / "results.json").read_text())
    assert results["trainable_parameters"] == 1792
    assert 0 <= results["base"]["accuracy"] <= 1
    assert 0 <= results["adapter"]["accuracy"] <= 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((out / "run.json").read_text())
    assert told["run"]["train"]["steps"] == 4
    assert told["versions"]["torch"] == torch.__version__


def test_a_toml_file_says_what_flags_say(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f"""
        base = "{place / "base"}"
        out = "{place / "by-toml"}"
        [data]
        source = "{place / "rows.csv"}"
        context = "text"
        label = "verdict"
        [method]
        name = "lora"
        rank = 3
        targets = ["attn.q"]
        [method.ranks]
        "attn.q" = 2
        [train]
        steps = 1
        batch_size = 4
        """
    )
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--train.steps", "2"]) == 0
    flags = ["--method", "lora", "--method.rank", "3", "--method.targets", "attn.q", "--method.ranks", '{"attn.q": 2}']
    assert main(words(place, "by-flags", *flags, "--train.steps", "2", "--train.checkpoint_every", "0")) == 0
    one, other = (json.loads((place / out / "run.json").read_text())["run"] for out in ("by-toml", "by-flags"))
    assert one | {"out": ""} == other | {"out": ""}
    same = [(place / out / "adapter_model.safetensors").read_bytes() for out in ("by-toml", "by-flags")]
    assert same[0] == same[1]


def test_resuming_a_run_ends_with_the_same_bytes(place: Path) -> None:
    assert main(words(place, "stopped")) == 0
    (place / "stopped" / "checkpoints" / "step-00000004.safetensors").unlink()
    assert main(words(place, "stopped", "--resume")) == 0
    whole, resumed = (place / name / "adapter_model.safetensors" for name in ("adapter", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_eval_shows_base_and_adapter_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--evaluate.measures", "accuracy,exact_match,perplexity", "--evaluate.max_new_tokens", "3"]
    assert main(["eval", str(place / "adapter"), "--json", *told]) == 0
    found = json.loads(capsys.readouterr().out)
    saved = json.loads((place / "adapter" / "results.json").read_text())
    assert found["adapter"]["accuracy"] == saved["adapter"]["accuracy"]
    assert found["base"]["perplexity"] != found["adapter"]["perplexity"]
    assert main(["eval", str(place / "adapter")]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_generate_writes_on_from_the_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["generate", str(place / "adapter"), "--prompt", "a fine film", "--max_new_tokens", "3", "--beside_base"]
    assert main(told) == 0
    lines = capsys.readouterr().out
    assert "[base] a fine film" in lines
    assert "[adapter] a fine film" in lines


def test_merge_writes_a_model_that_needs_no_lorakit(place: Path) -> None:
    assert main(["merge", str(place / "adapter"), "--out", str(place / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    lk.load(model, place / "adapter")
    ids = AutoTokenizer.from_pretrained(place / "merged")("a fine film", return_tensors="pt").input_ids
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)


def test_inspect_says_what_is_in_a_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "adapter")]) == 0
    told = capsys.readouterr().out
    assert "lora" in told and "rank 8" in told and "q_proj.lora_A.weight" in told
    assert main(["inspect", str(place / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lorakit"]["method"]["rank"] == 8


def test_an_encoder_learns_to_classify_and_saves_its_head(place: Path) -> None:
    assert main(words(place, "classifier", base="encoder")) == 0
    assert any("classifier" in key for key in load_file(place / "classifier" / "adapter_model.safetensors"))
    found = json.loads((place / "classifier" / "results.json").read_text())
    assert main(["eval", str(place / "classifier"), "--json"]) == 0
    assert set(found["adapter"]) == {"accuracy"}


BAD: list[tuple[list[str], str]] = [
    (["trian"], "did you mean train"),
    (["train", "--bse", "x"], "did you mean --base"),
    (["train", "--base", "{base}", "--data", "revews", "--out", "{new}"], "did you mean reviews"),
    (["train", "--base", "smollm-135m", "--data", "reviews", "--out", "{new}"], "did you mean smollm2-135m"),
    (["train", "--base", "{base}", "--data", "{rows}", "--data.context", "txet", "--data.label", "verdict",
      "--out", "{new}"], "did you mean text"),
    (["train", "--base", "{base}", "--data", "{empty}", "--out", "{new}"], "is empty"),
    (["{train}", "--method.targets", "attn.quarry", "--out", "{new}"], "did you mean attn.q"),
    (["{train}", "--method.targets", "*.q_porj", "--out", "{new}"], "did you mean q_proj"),
    (["{train}", "--method.rank", "0", "--out", "{new}"], "at least 1"),
    (["{train}", "--method.rank", "99", "--out", "{new}"], "above the matrix"),
    (["{train}", "--method.rank", "many", "--out", "{new}"], "method.rank"),
    (["{train}", "--method", "lara", "--out", "{new}"], "did you mean lora"),
    (["{train}", "--train.max_length", "1", "--out", "{new}"], "max_length"),
    (["{train}", "--out", "{adapter}"], "holds another run"),
    (["{train}", "--out", "{adapter}", "--resume", "--train.learning_rate", "0.5"], "learning_rate"),
    (["eval", "{nowhere}"], "no such folder"),
    (["eval", "{adapter}", "--base", "{encoder}"], "no layer"),
    (["merge", "{adapter}", "--out", "{base}"], "exists already"),
    (["generate", "{adapter}"], "no prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_mistake_is_one_sentence_and_exit_code_2(
    line: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", iter(()))
    (place / "empty.csv").write_text("")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    named = {name: str(place / name) for name in ("base", "encoder", "adapter", "nowhere", "new")}
    named |= {"rows": str(place / "rows.csv"), "empty": str(place / "empty.csv")}
    start = words(place, "")
    del start[start.index("--out") : start.index("--out") + 2]
    full = [part for word in line for part in (start if word == "{train}" else [word.format(**named)])]
    assert main(full) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("lorakit: ")
    assert sentence in told[-1]
    assert not (place / "new").exists()
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_debug_shows_where_a_mistake_was_found() -> None:
    with pytest.raises(lk.LorakitError):
        main(["eval", "nowhere", "--debug"])


def test_help_lists_every_verb_and_every_field_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {verb}" in overview for verb in ("train", "eval", "generate", "merge", "inspect", "demo"))
    assert main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--train.learning_rate" in told
    assert "at the end of the warm-up" in told
    assert "--data.source" in told
