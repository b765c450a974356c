"""`lorakit inspect` on one adapter of any format, and on a folder of many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.cli import main
from lorakit.interop import Told, convert
from tests.laws.cases import adapted
from tests.tiny import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters in a folder, one of them a file, and a broken one."""
    folder = tmp_path_factory.mktemp("inspect") / "many"
    model = tiny("llama")
    lk.attach(
        model, lk.LoRA(rank=2, alpha=4, targets=("attn.q", "attn.v"), ranks={"attn.v": 3}, train="lm_head"), name="a"
    )
    lk.save(model, "a", folder / "head")
    lk.save(adapted("llama", "dora"), "a", folder / "turned")
    lk.save(adapted("llama", "lora"), "a", folder / "plain")
    tiny("llama").save_pretrained(folder.parent / "base")
    convert(folder / "plain", folder / "plain.gguf", "gguf", Told(base=str(folder.parent / "base")))
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"{}")
    return folder


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The words of each line printed."""
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_layers_are_told_with_rank_and_scale(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "head")]) == 0
    told = rows(capsys)
    assert ["model.layers.*.self_attn.q_proj", "linear", "2", "2", "32", "x", "32", "2"] in told
    assert ["model.layers.*.self_attn.v_proj", "linear", "3", "1.333", "16", "x", "32", "2"] in told
    assert ["tensors", "of", "its", "own", "1"] in told and ["format", "PEFT", "folder"] in told
    assert ["base_model.model.lm_head.weight", "1", "64", "x", "32", "F32"] in told


def test_magnitudes_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "turned")]) == 0
    assert any(line[:2] == ["magnitudes", "(DoRA)"] for line in rows(capsys))


def test_a_file_of_another_format_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "plain.gguf")]) == 0
    told = rows(capsys)
    assert ["format", "GGUF", "adapter"] in told and ["written", "by", "another", "program"] in told
    assert main(["inspect", str(place / "plain.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"]


def test_a_folder_of_adapters_is_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place)]) == 0
    told = capsys.readouterr().out
    assert f"{place}: 5 adapters" in told and "1 of them cannot be loaded" in told
    lines = [line.split() for line in told.splitlines() if line.strip()]
    assert [line[0] for line in lines if line[0] in ("head", "plain", "plain.gguf", "turned")] == [
        "head", "plain", "plain.gguf", "turned"
    ]  # fmt: skip
    (head,) = (line for line in lines if line[0] == "head")
    assert "2-3" in head and "1.333-2" in head
    (broken,) = (line for line in lines if line[0] == "broken")
    assert "damaged" in " ".join(broken)
    assert main(["inspect", str(place), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == ["broken", "head", "plain", "plain.gguf", "turned"]


def test_a_broken_one_alone_and_a_folder_of_nothing_are_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words in ((place / "broken", "damaged"), (tmp_path, "none of the formats known"),
                        (tmp_path / "nowhere", "no such file or folder")):  # fmt: skip
        assert main(["inspect", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_alpha_is_taken_where_the_file_does_not_say(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"h.0.q.lora_A": torch.ones(2, 4), "h.0.q.lora_B": torch.ones(4, 2)}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 2
    assert "alpha" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.pt"), "--alpha", "6"]) == 0
    assert ["h.*.q", "linear", "2", "3", "4", "x", "4", "1"] in rows(capsys)
