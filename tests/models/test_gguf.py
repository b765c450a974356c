"""A GGUF file is converted once, whole or not at all, into a folder that holds the same weights."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.errors import BadModel, LorakitError
from lorakit.models import cache_folder, convert, gguf, load
from tests.models import tiny_gguf


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny_gguf.write(tmp_path / "tiny.gguf")


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []
    really = gguf._convert

    def counted(path: Path, folder: Path) -> None:
        calls.append(path)
        really(path, folder)

    monkeypatch.setattr(gguf, "_convert", counted)
    return calls


def test_the_weights_are_those_of_the_file(home: Path, file: Path) -> None:
    model, tokenizer = load(str(file))
    expected = tiny_gguf.tensors()
    state = model.state_dict()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }.items():
        assert np.array_equal(state[ours].numpy(), expected[theirs])
    assert tokenizer("abc")["input_ids"] == [5, 3]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|end|>")
    assert model(torch.tensor([[5, 3]])).logits.isfinite().all()


def test_it_is_converted_once_by_content(home: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_conversions(monkeypatch)
    first = convert(file)
    shutil.copy(file, copy := file.with_name("copy")), copy.replace(file)
    assert convert(file) == first
    assert len(calls) == 1
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert convert(file) != first
    assert first.parent == home / "models"


def test_two_at_once_convert_once(home: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_conversions(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(convert, [file, file]))
    assert len(folders) == len(calls) == 1


def test_a_conversion_that_fails_leaves_nothing(home: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> object:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_model", full)
        with pytest.raises(LorakitError, match=r"No space left on device.*LORAKIT_HOME"):
            convert(file)
    assert [entry for entry in (home / "models").iterdir() if entry.is_dir()] == []
    assert convert(file).is_dir()


def test_a_broken_file_is_refused(home: Path, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "text.gguf"
    other.write_text("hello")
    with pytest.raises(BadModel, match="does not begin with GGUF"):
        convert(other)
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(BadModel, match=r"tiny\.gguf cannot be read"):
        convert(file)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LORAKIT_HOME")
    assert "lorakit" in str(cache_folder())


@pytest.mark.slow
def test_the_second_load_of_smollm2_is_many_times_faster(home: Path) -> None:
    started = time.perf_counter()
    first, _ = load("smollm2-135m")
    between = time.perf_counter()
    second, tokenizer = load("smollm2-135m")
    assert (time.perf_counter() - between) * 5 < between - started
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.get_output_embeddings().weight is second.get_input_embeddings().weight
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert "Paris" in tokenizer.decode(second.generate(ids, max_new_tokens=5, do_sample=False)[0])
