"""`lorakit check`: its table, its JSON, its exit code, and one sentence for a mistake."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.cli import _declare, main
from lorakit.cli.check import Options
from tests.tiny import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound adapter, one with a trained bias, and a loralib file."""
    folder = tmp_path_factory.mktemp("check")
    sound = lk.LoRA(rank=2, alpha=4, targets=("attn.q", "attn.v"))
    for name, method in (("sound", sound), ("biases", replace(sound, bias="all"))):
        model = tiny("llama", attention_bias=True)
        lk.attach(model, method, name="a")
        lk.save(model, "a", folder / name)
    assert main(["convert", str(folder / "sound"), "--out", str(folder / "a.pt"), "--to", "loralib"]) == 0
    return folder


def test_what_is_sound_is_said_in_a_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(place / "sound"), "--for", "vllm"]) == 0
    assert capsys.readouterr().out == f"vLLM 0.33.0 takes {place / 'sound'} as it is\n"


def test_what_is_refused_is_a_table_with_the_command_that_mends_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(place / "biases"), "--for", "vllm"]) == 1
    told = capsys.readouterr().out
    assert "refuses" in told and "bias='all'" in told
    assert f"mend 1: lorakit merge {place / 'biases'} --out {place / 'biases'}-merged\n" in told
    assert main(["check", str(place / "biases"), "--for=peft", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["for"] == "PEFT 0.21.2" and [each["grade"] for each in found["findings"]] == ["ignores"]


def test_other_formats_are_checked_with_what_their_files_do_not_say(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(place / "a.pt"), "--for", "vllm", "--alpha", "4"]) == 1
    mend = capsys.readouterr().out.splitlines()[-1].removeprefix("mend 1: lorakit ")
    assert main(shlex.split(mend)) == 0
    assert main(["check", str(place / "a-portable"), "--for", "vllm"]) == 0


@pytest.mark.parametrize(("words", "sentence"), [
    (["{sound}"], "--for is not given"),
    (["{sound}", "--for", "vlm"], "did you mean vllm"),
    (["{sound}", "--fr", "vllm"], "did you mean --for"),
    (["{nowhere}", "--for", "vllm"], "no such file or folder"),
    (["{place}/a.pt", "--for", "vllm"], "alpha"),
])  # fmt: skip
def test_mistakes_are_a_sentence(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"sound": place / "sound", "nowhere": place / "nowhere", "place": place}
    assert main(["check", *(word.format(**places) for word in words)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_and_written_flags_say_for_too(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "check.toml").write_text('for = "sglang"')
    assert main(["check", str(place / "sound"), "--config", str(tmp_path / "check.toml")]) == 0
    assert capsys.readouterr().out.startswith("SGLang")
    assert _declare.words_of(Options, {"for_": "vllm"}) == ["--for=vllm"]
