"""The scripts in `examples/` run as they stand, offline, and leave an adapter that does what they taught it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import lorakit as lk
from tests.ecosystem.small import ADAPTER_FILES, files_in
from tests.source import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")


def learned(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.syspath_prepend(EXAMPLES)
    from _setting import base, reviews

    from lorakit.evaluate import generate_texts

    model, tokenizer = base(None)
    lk.load(model, folder, name="a")
    return generate_texts(model, tokenizer, [reviews()[0].context], max_new_tokens=6)[0].strip() == answer


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "mixed_batch"])
def test_an_example_runs_and_its_adapter_has_learned(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, monkeypatch, "--out", str(tmp_path))
    assert f"the adapter is in {tmp_path}" in capsys.readouterr().out
    assert {Path(file).name for file in files_in(tmp_path)} == ADAPTER_FILES
    assert learned(tmp_path, "negative", monkeypatch)


def test_the_rows_of_the_mixed_batch_answer_each_in_their_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("mixed_batch", monkeypatch, "--out", str(tmp_path))
    answers = [line.rsplit("Sentiment: ", 1)[1] for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert answers[1:] == ["'negative'", "'schlecht'", "'gut'", "'positive'"]
    assert learned(tmp_path / "german", "schlecht", monkeypatch)
