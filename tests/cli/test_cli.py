"""Each verb on a tiny model: what it leaves behind, what it prints, and one sentence for each mistake."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk
from lorakit.cli import _show, main
from lorakit.core import files
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
    assert main(words(folder, "classifier", base="encoder")) == 0
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
        resume = false
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
    assert "lora, " in told and "rank 8" in told and "q_proj.lora_A.weight" in told
    assert main(["inspect", str(place / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lorakit"]["method"]["rank"] == 8


def test_the_parts_of_a_combination_are_told_like_methods(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = '["lora", {"name": "prefix-embedding", "prefix": 3}]'
    assert main(words(place, "parts", "--method", "combine", "--method.parts", parts)) == 0
    told = capsys.readouterr().out
    assert " generate " in told and " merge " not in told  # nor could it be
    assert main(["inspect", str(place / "parts")]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["method", "combine"] in shown
    assert ["part", "1", "lora,"] in [line[:3] for line in shown]
    assert ["part", "2", "prefix-embedding,", "prefix", "3"] in shown


def test_a_method_that_merges_is_told_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, "mergeable")) == 0
    assert f" merge {place / 'mergeable'} --out " in capsys.readouterr().out


def test_only_a_terminal_folds_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = "a.long.path." * 20
    _show.table("", ["layer", "rank"], [[path, 12345]])
    assert f"{path}   12,345" in capsys.readouterr().out
    monkeypatch.setattr(_show, "console", Console(force_terminal=True, color_system=None, width=60))
    _show.table("", ["layer", "rank"], [[path, 12345]])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_an_encoder_learns_to_classify_and_saves_its_head(place: Path) -> None:
    assert any("classifier" in key for key in load_file(place / "classifier" / "adapter_model.safetensors"))
    found = json.loads((place / "classifier" / "results.json").read_text())
    assert main(["eval", str(place / "classifier"), "--json"]) == 0
    assert set(found["adapter"]) == {"accuracy"}


PREFIX = ("{train}", "--method", "prefix-embedding", "--method.prefix")
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
    (["{train}", "--method.rank", "many", "--out", "{new}"], "--method.rank must be a whole number, not 'many'"),
    (["{train}", "--method.bias", "some", "--out", "{new}"], "--method.bias must be one of none, all, lora_only, not"),
    (["{train}", "--method.ranks", "4", "--out", "{new}"], "must be a whole number by name"),
    (["{train}", "--train.learning_rate", "fast", "--out", "{new}"], "--train.learning_rate must be a number, not"),
    (["{train}", "--out", "{new}", "--resume=perhaps"], "--resume must be True or False, not 'perhaps'"),
    (["{train}", "--out", "{new}", "--train.steps"], "--train.steps is not given: optimiser steps"),
    (["{train}"], "--out is not given: folder of the adapter"),
    (["inspect"], "adapter is not given: folder of the adapter"),
    (["{train}", "--method", "lara", "--out", "{new}"], "did you mean lora"),
    (["{train}", "--train.max_length", "1", "--out", "{new}"], "max_length"),
    ([*PREFIX, "900", "--out", "{new}"], "(prefix=900, infix=0), but LlamaForCausalLM has 64 positions in all, which "
     "leaves none for an example"),
    ([*PREFIX, "62", "--out", "{new}"], "leaves 2 for an example; it needs "),
    ([*PREFIX, "64", "--base", "{encoder}", "--out", "{new}"], "BertForSequenceClassification has 64 positions in all"),
    (["{train}", "--method", "prefix-layer", "--method.prefix", "61", "--method.infix", "2", "--out", "{new}"],
     "(prefix=61, infix=2)"),
    (["{train}", "--method", "combine", "--method.parts", '["lora", {{"name": "prefix-embedding", "prefix": 62}}]',
      "--out", "{new}"], "combine puts 62 places"),
    (["{train}", "--train.seed", "-1", "--out", "{new}"], "seed=-1"),
    (["{train}", "--evaluate.batch_size", "0", "--out", "{new}"], "batch_size=0 must be at least 1"),
    (["{train}", "--base", "{encoder}", "--evaluate.measures", "perplexity", "--out", "{new}"], "no language-model"),
    (["{train}", "--base", "{encoder}", "--evaluate.measures", "exact_match", "--out", "{new}"], "neither writes"),
    (["{train}", "--config", "{nowhere}", "--out", "{new}"], "of --config cannot be read"),
    (["{train}", "--out", "{adapter}"], "holds another run"),
    (["{train}", "--out", "{adapter}", "--resume", "--train.learning_rate", "0.5"], "learning_rate"),
    (["eval", "{nowhere}"], "no such folder"),
    (["eval", "{adapter}", "--base", "{encoder}"], "no layer"),
    (["eval", "{adapter}", "--data.test_examples", "0"], "test_examples=0"),
    (["eval", "{adapter}", "--data.contxt", "text"], "did you mean --data.context"),
    (["merge", "{adapter}", "--out", "{base}"], "exists already"),
    (["generate", "{adapter}"], "no prompt"),
    (["generate", "{classifier}", "--prompt", "a"], "has no language-model head"),
    (["generate", "{adapter}", "--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens=0"),
    (["generate", "{adapter}", "--prompt", "a", "--max_new_tokens", "64"], "no room for a prompt"),
    (["generate", "{adapter}", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
    (["generate", "{adapter}", "--prompt", "a", "--seed", "99999999999999999999"], "seed=99999999999999999999"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_mistake_is_one_sentence_and_exit_code_2(
    line: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", iter(()))
    (place / "empty.csv").write_text("")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    named = {name: str(place / name) for name in ("base", "encoder", "adapter", "classifier", "nowhere", "new")}
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


def test_eval_takes_the_recorded_data_but_for_what_is_given(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (place / "rows.csv").read_text().replace("verdict", "judged")
    (place / "renamed.csv").write_text(rows)
    (place / "other.csv").write_text((place / "rows.csv").read_text())
    assert main(["eval", str(place / "adapter"), "--data", str(place / "other.csv"), "--data.test_examples", "3"]) == 0
    assert "3 test examples of" in " ".join(capsys.readouterr().out.split())
    renamed = ["eval", str(place / "adapter"), f"--data={place / 'renamed.csv'}"]
    assert main(renamed) == 2
    assert main([*renamed, "--data.label", "judged"]) == 0


def test_the_adapters_tensors_are_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, real = [], files.read
    monkeypatch.setattr(files, "read", lambda folder: reads.append(folder) or real(folder))
    assert main(["eval", str(place / "adapter")]) == 0
    assert len(reads) == 1


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"run": {"data": {"sauce": 1}}}', '{"run": {"data": [1]}}',
                                    '{"run": {"data": {"source": "reviews", "seeds": 1}}}'])  # fmt: skip
def test_a_damaged_record_is_one_sentence(place: Path, record: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / "damaged").mkdir(exist_ok=True)
        (place / "damaged" / name).write_bytes((place / "adapter" / name).read_bytes())
    (place / "damaged" / "run.json").write_text(record)
    assert main(["eval", str(place / "damaged")]) == 2
    assert "--data" in capsys.readouterr().err


TOML: list[tuple[bytes, str]] = [
    (b"[method]\nname = 3", "nothing called '3'"),
    (b'method = "lara"', "did you mean lora"),
    (b'data = "revews"', "did you mean reviews"),
    (b'base = "\xe9"', "not TOML in UTF-8"),
    (b"base = ", "not TOML in UTF-8"),
    (b"[train]\nlearning_rat = 1", "did you mean --train.learning_rate"),
    (b"[trian]\nsteps = 1", "no option --trian"),
    (b"resum = false", "did you mean --resume"),
    (b"[train]\nsteps = true", "train.steps"),
]


@pytest.mark.parametrize(("content", "sentence"), TOML, ids=[sentence for _, sentence in TOML])
def test_a_mistake_in_a_toml_file_is_one_sentence(
    content: bytes, sentence: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    told = [] if content.startswith(b"data") else ["--data", "reviews"]
    command = ["train", "--base", str(place / "base"), "--out", str(tmp_path / "new"), *told]
    assert main([*command, "--config", str(tmp_path / "run.toml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lorakit: ") and sentence in error
    assert not (tmp_path / "new").exists()


def test_the_texts_of_a_run_are_cut_to_what_the_model_can_read(place: Path, tmp_path: Path) -> None:
    tiny("gpt2", vocab_size=400).save_pretrained(tmp_path / "gpt2")
    made().save_pretrained(tmp_path / "gpt2")
    long = "".join(f"{'good' * (n % 2)} {'film ' * 200}{n},{'good' if n % 2 else 'bad'}\n" for n in range(24))
    (tmp_path / "rows.csv").write_text("text,verdict\n" + long)
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    for base in ("gpt2", "encoder"):
        told = ["--data.context", "text", "--data.label", "verdict", "--train.steps", "1", "--train.batch_size", "2"]
        source = ["--base", str(tmp_path / base), "--data", str(tmp_path / "rows.csv"), *told]
        assert main(["train", *source, "--train.max_length", "4096", "--out", str(tmp_path / f"on-{base}")]) == 0
    assert main(["generate", str(tmp_path / "on-gpt2"), "--prompt", "film " * 300, "--max_new_tokens", "4"]) == 0


def test_a_run_in_the_folder_one_stands_in_is_named_after_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words(place, ""), "--out", "."]) == 0
    assert f" merge . --out {tmp_path}-merged\n" in capsys.readouterr().out
    assert main(["inspect", "."]) == 0


def test_what_is_printed_is_the_text_as_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "he said [/i] so :smile: [bold] " + "a fine film " * 3
    assert main(["generate", str(place / "adapter"), "--prompt", prompt * 2, "--max_new_tokens", "1"]) == 0
    assert prompt * 2 in capsys.readouterr().out
    _show.table("[/b]", ["[/i]"], [["he said [/i] so :smile:"]])
    _show.say(f"  lorakit train --out {'x' * 200} [/i] :smile:")
    told = capsys.readouterr().out
    assert "[/b]" in told and "he said [/i] so :smile:" in told
    assert f"  lorakit train --out {'x' * 200} [/i] :smile:\n" in told


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


@pytest.mark.parametrize("words", [["--method.train_norms=false"], ["--method.train_norms", "false"]])
def test_a_switch_that_a_preset_turns_on_can_be_turned_off(words: list[str]) -> None:
    from lorakit.cli import _declare
    from lorakit.cli.train import Options

    given = ["--base", "b", "--data", "d.csv", "--out", "o", "--method", "compacter"]
    assert _declare.parse(Options, "train", "", given).method.train_norms is True
    assert _declare.parse(Options, "train", "", [*given, *words]).method.train_norms is False
    assert _declare.parse(Options, "train", "", [*given, *words, "--method.train_norms"]).method.train_norms is True


@pytest.mark.parametrize(("words", "value"), [((), True), (("--train.share_contexts=false",), False)])
def test_what_holds_unless_told_otherwise_holds(words: tuple[str, ...], value: bool) -> None:
    from lorakit.cli._declare import parse
    from lorakit.reproduce.run import Run

    run = parse(Run, "train", "", ["--base", "b", "--data", "d", "--out", "o", *words])
    assert run.train.share_contexts is value
