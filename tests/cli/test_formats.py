"""The verbs that read, write and study adapters: what they leave and say, and one sentence for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import interop
from lorakit.cli import main
from lorakit.core.exchange import factored
from tests.cli.test_cli import words
from tests.reproduce.small import write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two adapters that were trained on it."""
    folder = tmp_path_factory.mktemp("formats")
    write(folder)
    for name, rank in (("one", "2"), ("two", "4")):
        assert main(words(folder, name, "--method.rank", rank, "--train.seed", rank)) == 0
    return folder


def changed(path: Path) -> dict[str, torch.Tensor]:
    """ΔW of every matrix."""
    found = {each.name: each.read() for each in factored(interop.read(path))}
    return {name: b_OR @ a_RI for name, (a_RI, b_OR) in found.items()}


def test_convert_and_compress_keep_what_they_promise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(run / "two"), "-o", str(tmp_path / "portable"), "--to", "portable"]) == 0
    assert "relative error at most" in capsys.readouterr().out
    before, after = changed(run / "two"), changed(tmp_path / "portable")
    assert before.keys() == after.keys()
    assert all(torch.allclose(value, after[name]) for name, value in before.items())
    small = tmp_path / "small"
    assert main(["compress", str(run / "two"), "-o", str(small), "--rank", "1", "--data.test_examples", "4"]) == 0
    told = capsys.readouterr().out
    assert "loss" in told
    assert "before" in told
    for name, delta in changed(small).items():
        left, values, right = torch.linalg.svd(before[name])
        assert torch.allclose(delta, values[0] * torch.outer(left[:, 0], right[0]), atol=1e-6)
    same = tmp_path / "same"
    assert main(["compress", str(run / "two"), "-o", str(same), "--keep", "1", "--measure=false"]) == 0
    assert all(torch.allclose(value, before[name], atol=1e-7) for name, value in changed(same).items())


def test_combine_adds_and_takes_away(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    assert main(["combine", str(run / "one"), str(run / "two"), "--weights", "1,-0.5", "-o", str(out)]) == 0
    assert "one and two by concatenation, rank 6" in capsys.readouterr().out
    first, second, both = (changed(path) for path in (run / "one", run / "two", out))
    assert all(torch.allclose(value, first[name] - 0.5 * second[name], atol=1e-7) for name, value in both.items())


def test_analyse_writes_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, base = tmp_path / "report.html", str(run / "base")
    assert main(["analyse", str(run / "one"), str(run / "two"), "--base", base, "--examples", "2", "-o", str(out)]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert "Where base and adapter disagree" in text
    assert "Table 7" in text


def test_a_file_that_names_no_data_is_analysed_without_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interop.convert(run / "one", tmp_path / "plain", "portable")
    words = [
        "analyse",
        str(tmp_path / "plain"),
        "--base",
        str(run / "base"),
        "-o",
        str(tmp_path / "new" / "report.html"),
    ]
    assert main(words) == 0
    assert "nothing is compared on text; name texts with --data" in capsys.readouterr().out
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "Table 7" in text
    assert "What the adapters do on text" not in text


def test_mistakes_are_one_sentence_and_leave_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(words: list[str], sentence: str) -> None:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
        assert not out.exists()

    one, out = str(run / "one"), tmp_path / "out"
    pickle, alphaless, nan, mixed = (tmp_path / name for name in ("pickle", "plain.pt", "nan", "mixed"))
    pickle.mkdir()
    torch.save({"x.lora_A.weight": Path("x")}, pickle / "adapter_model.bin")
    shutil.copy(run / "one" / "adapter_config.json", pickle)
    torch.save({"x.lora_A": torch.ones(2, 3), "x.lora_B": torch.ones(4, 2)}, alphaless)
    shutil.copytree(run / "one", nan)
    tensors = load_file(nan / "adapter_model.safetensors")
    save_file({key: value * torch.nan for key, value in tensors.items()}, nan / "adapter_model.safetensors")
    mixed.mkdir()
    (mixed / "notes.txt").write_text("nothing")
    refused(["convert", str(pickle), "-o", str(out)], "no tensor and could run code")
    refused(["convert", str(alphaless), "-o", str(out)], "--alpha")
    refused(["convert", str(nan), "-o", str(out)], "not finite real numbers")
    refused(["convert", str(mixed), "-o", str(out)], "none of the formats known")
    refused(["convert", one, "-o", str(out), "--to", "onnx"], "there is nothing called 'onnx' in formats")
    refused(["analyse", str(nan), "-o", str(out)], "not finite real numbers")
    refused(["analyse", one, one, "-o", str(out)], "named twice")
    refused(["combine", one, "-o", str(out), "--by", "magic"], "cannot be combined by 'magic'")
    refused(["combine", one, "-o", str(out), "--weights", "1,2"], "2 numbers for 1 adapters")
    refused(["combine", one, "-o", str(out), "--weights", "x"], "must be numbers")
    refused(["compress", one, "-o", str(out), "--keep", "0.5", "--rank", "1", "--measure=false"], "give one of them")
    refused(["compress", one, "-o", str(out), "--keep", "2", "--measure=false"], "no rank keeps 2")
    nowhere = [*("compress", one, "-o", str(out)), "--base", str(tmp_path / "nowhere"), "--data.test_examples", "2"]
    refused(nowhere, "there is no model")
    refused(["analyse", one, "-o", str(out), "--examples", "-1"], "give 0 or more")
    folder = tmp_path / "folder"
    folder.mkdir()
    for verb in ("compress", "combine"):
        assert main([verb, one, "-o", str(folder)]) == 2
        assert "exists already" in capsys.readouterr().err
    assert main(["analyse", one, "-o", str(folder)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_dora_is_refused_where_only_additive_updates_make_sense(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(run, "dora", "--method", "dora")) == 0
    capsys.readouterr()
    for verb in (["analyse"], ["compress", "--measure=false"], ["convert", "--to", "portable"], ["combine"]):
        assert main([verb[0], str(run / "dora"), *verb[1:], "-o", str(tmp_path / "out")]) == 2
        assert "DoRA" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["merge", str(run / "dora"), "--out", str(tmp_path / "merged")]) == 0
    out, base = str(tmp_path / "report.html"), str(run / "base")
    assert main(["analyse", str(tmp_path / "merged"), "--base", base, "--examples", "0", "-o", out]) == 0
    assert json.loads((run / "dora" / "adapter_config.json").read_text())["use_dora"]
