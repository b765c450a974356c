"""The demo tells its whole story and leaves what it promises; the real model's is marked slow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorakit.cli import main
from lorakit.reproduce import demo
from tests.data.conftest import made
from tests.tiny import tiny

KEYS = {
    "accuracy_before",
    "accuracy_after",
    "train_seconds",
    "tokens_per_second",
    "adapter_bytes",
    "model_bytes",
    "trainable_parameters",
    "merged_max_logit_difference",
    "unmerge_bit_exact",
    "written_as_asked",
    "quick",
}


def check(out: Path) -> dict[str, object]:
    results = json.loads((out / "results.json").read_text())
    assert results.keys() >= KEYS
    assert results["unmerge_bit_exact"] is True
    assert results["merged_max_logit_difference"] < 1e-3
    assert all(0 <= results[key] <= 1 for key in ("accuracy_before", "accuracy_after", "written_as_asked"))
    assert all(math.isfinite(results[key]) for key in ("train_seconds", "tokens_per_second"))
    assert results["adapter_bytes"] == (out / "reviews" / "adapter_model.safetensors").stat().st_size
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "writer" / "adapter_config.json").is_file()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    return results


def test_the_demo_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama", vocab_size=400, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    made().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(demo, "BASE", str(tmp_path / "base"))
    monkeypatch.setattr(demo, "FULL", demo.Sizes(train=16, test=8, writer_train=16, written=4, timed_tokens=2))
    out = tmp_path / "demo"
    for _ in range(2):  # the second run replaces what the first left, and nothing else
        assert main(["demo", "--out", str(out)]) == 0
        (out / "rank4").mkdir(exist_ok=True)
        (out / "rank4" / "results.json").write_text("hours of work")
    assert (out / "rank4" / "results.json").read_text() == "hours of work"
    results = check(out)
    assert results["quick"] is False
    told = capsys.readouterr().out
    assert "the base" in told and "writer" in told and "lorakit generate" in told
    assert f"--out {tmp_path / 'reviews-rank4'}\n" in told
    assert len(json.loads((out / "reviews.json").read_text())) == 4


def test_the_demo_refuses_a_folder_that_holds_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not a demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", ["{", "[1]", "3", "[]", '"demo"', "\xff"])
def test_the_demo_refuses_damaged_results_and_files(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content, encoding="latin-1")
    for out in (tmp_path, tmp_path / "results.json"):
        assert main(["demo", "--out", str(out)]) == 2
        assert "not a demo's" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text(encoding="latin-1") == content


def test_the_demo_clears_nothing_before_its_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "results.json").write_text('{"demo": "finished"}')
    monkeypatch.setattr(demo, "BASE", str(tmp_path / "nowhere"))
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "results.json").read_text() == '{"demo": "finished"}' and (tmp_path / "reviews").is_dir()


@pytest.mark.slow
def test_the_quick_demo_on_the_real_model(tmp_path: Path) -> None:
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    results = check(tmp_path / "demo")
    assert results["quick"] is True
    assert results["trainable_parameters"] == 460_800
