"""Saving and loading is the identity; files are deterministic, atomic and strictly read."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.core import atomic, files
from lorakit.core.state import adapter_tensors
from lorakit.errors import BadAdapterFile, LorakitError, NeverActed
from tests.laws.cases import adapted, bits, every_case, every_dtype, output, same_bits, scramble
from tests.tiny import tiny

TENSORS = "adapter_model.safetensors"


@every_case
@every_dtype
def test_save_and_load_are_the_identity(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(family, method, dtype)
    expected, tensors = output(model), adapter_tensors(model, "a")
    lk.save(model, "a", tmp_path / "one")
    other = tiny(family, dtype)
    generator = torch.random.get_rng_state()
    assert lk.load(other, tmp_path / "one") == "one"
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.equal(output(other), expected)
    for key, value in adapter_tensors(other, "one").items():
        assert torch.equal(value, tensors[key]), key
    assert lk.parameters(other) == []  # loaded adapters are frozen
    lk.save(other, "one", tmp_path / "two")
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_saving_while_merged_writes_the_same_bytes(tmp_path: Path) -> None:
    model = adapted("gpt2", "lora-linear")
    lk.save(model, "a", tmp_path / "before")
    lk.merge(model, "a")
    lk.save(model, "a", tmp_path / "merged")
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_a_loaded_adapter_can_be_trained_further(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    lk.load(model, tmp_path / "a", "again", trainable=True)
    assert len(lk.parameters(model, "again")) == len(lk.parameters(model, "a"))


def test_the_bytes_are_equal_across_processes_and_hold_no_paths(tmp_path: Path) -> None:
    script = (
        "import sys, torch, lorakit as lk; from tests.laws.cases import adapted;"
        "torch.manual_seed(3); lk.save(adapted('gpt2', 'lora-ranks'), 'a', sys.argv[1])"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], env=environment, check=True)
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "1" / name).read_bytes()


def test_no_copy_of_the_base_is_written(tmp_path: Path) -> None:
    model = adapted("llama", "lora-embed")
    lk.save(model, "a", tmp_path / "a")
    assert all("lora_" in key for key in load_file(tmp_path / "a" / TENSORS))


def _break(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    with files.safe_open(folder / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata=metadata)


def test_every_fault_is_listed_and_nothing_is_attached(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    one, two, *_ = sorted(load_file(tmp_path / "a" / TENSORS))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[one]
        tensors[two] = torch.zeros(3, 3)
        tensors["base_model.model.extra.weight"] = torch.zeros(2)

    _break(tmp_path / "a", change)
    other = tiny("llama")
    before = bits(other)
    with pytest.raises(BadAdapterFile) as caught:
        lk.load(other, tmp_path / "a")
    told = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "is missing" in told and "(3, 3)" in told and "extra.weight is not part of it" in told
    assert same_bits(bits(other), before)
    assert not any(module._forward_hooks for module in other.modules())
    with pytest.raises(LorakitError):
        lk.summary(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    _break(tmp_path / "a", lambda tensors: next(iter(tensors.values())).fill_(value))
    with pytest.raises(BadAdapterFile, match="not finite"):
        lk.load(tiny("llama"), tmp_path / "a")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    (tmp_path / "a" / TENSORS).write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    with pytest.raises(BadAdapterFile, match="damaged"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_another_base_is_refused_unless_asked_for(tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    other = tiny("llama", seed=1)
    with pytest.raises(BadAdapterFile, match="another base: 4 of 4"):
        lk.load(other, tmp_path / "a")
    lk.load(other, tmp_path / "a", any_base=True)
    lk.load(tiny("llama", torch.bfloat16), tmp_path / "a")  # the same base, rounded
    with pytest.raises(BadAdapterFile, match="shape"):
        lk.load(tiny("llama", hidden_size=16), tmp_path / "a")
    with pytest.raises(BadAdapterFile, match="no layer"):
        lk.load(tiny("gpt2"), tmp_path / "a")


def test_pickles_newer_formats_and_wrong_folders_are_refused_in_a_sentence(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    with pytest.raises(BadAdapterFile, match="no such folder"):
        lk.load(model, tmp_path / "nowhere")
    (tmp_path / "pickle").mkdir()
    torch.save({}, tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(BadAdapterFile, match="pickle"):
        lk.load(model, tmp_path / "pickle")
    lk.save(model, "a", tmp_path / "outer" / "a")
    with pytest.raises(BadAdapterFile, match="its folders a"):
        lk.load(model, tmp_path / "outer")
    raw = (tmp_path / "outer" / "a" / TENSORS).read_bytes()
    (tmp_path / "outer" / "a" / TENSORS).write_bytes(
        raw.replace(b'{\\"base', b'{\\"base').replace(b'\\"format\\":1', b'\\"format\\":9')
    )
    with pytest.raises(BadAdapterFile, match="newer lorakit"):
        lk.load(model, tmp_path / "outer" / "a")


def test_the_header_is_plain_safetensors(tmp_path: Path) -> None:
    lk.save(adapted("bert", "lora-linear"), "a", tmp_path / "a")
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    told = json.loads(header["__metadata__"]["lorakit"])
    assert told["method"]["name"] == "lora"
    assert {entry["path"] for entry in told["plan"]} == set(told["base"]["samples"])


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    scramble(model, "a", seed=7)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    for folder in ("a", "new"):
        with pytest.raises(LorakitError, match="disk is full"):
            lk.save(model, "a", tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_delta_that_never_acted_is_an_error_at_save(tmp_path: Path) -> None:
    model = tiny("bert")
    model.add_module("spare", torch.nn.Linear(4, 4))
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q", "spare")))
    lk.save(model, "default", tmp_path / "fresh")  # nothing has run yet: nothing to report
    output(model)
    assert "1 layers have not acted yet, first spare" in str(lk.summary(model))
    with pytest.raises(NeverActed, match="spare"):
        lk.save(model, "default", tmp_path / "a")
