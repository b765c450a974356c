"""Folders of many adapters are told from headers alone; what is broken is told with its fault."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.errors import BadAdapterFile
from lorakit.interop import Told, convert
from lorakit.interop.listing import listing
from tests.laws.cases import METHODS, adapted, method_named
from tests.tiny import tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def sparse(folder: Path, *, rank: int = 8, width: int = 1 << 20, **fields: Any) -> Path:
    """A PEFT folder of one layer whose file has a header, and a hole in place of its numbers."""
    folder.mkdir(parents=True)
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]} | fields
    (folder / CONFIG).write_text(json.dumps(told))
    size = 4 * rank * width
    entries = {
        f"base_model.model.layers.0.q_proj.lora_{part}.weight": {
            "dtype": "F32", "shape": shape, "data_offsets": [number * size, (number + 1) * size]
        } for number, (part, shape) in enumerate({"A": [rank, width], "B": [width, rank]}.items())
    }  # fmt: skip
    header = json.dumps(entries).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * size)
    return folder


def test_a_thousand_adapters_are_listed_without_reading_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files claim 64 MiB each and hold none of it; whoever reads a tensor fails at once."""
    for number in range(1000):
        sparse(tmp_path / f"{number % 7}" / f"{number:04}", lora_alpha=number)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lorakit.interop.shards.Entry.read", refuse)
    monkeypatch.setattr("torch.load", refuse)
    found = listing(tmp_path)
    assert [each.name for each in found] == sorted(f"{n % 7}/{n:04}" for n in range(1000))
    assert {each.scales for each in found} == {(number / 8,) for number in range(1000)}
    assert all(each.parameters == 2 * 8 << 20 and each.bytes > 4 * each.parameters for each in found)


def test_what_is_cut_off_is_told_by_its_fault_and_the_others_are_listed(tmp_path: Path) -> None:
    sparse(tmp_path / "whole")
    cut = sparse(tmp_path / "cut") / TENSORS
    cut.write_bytes(cut.read_bytes()[:200])
    (sparse(tmp_path / "words") / CONFIG).write_text("{")
    sparse(tmp_path / "types", r="eight")
    (sparse(tmp_path / "empty") / TENSORS).unlink()
    (tmp_path / "file.safetensors").write_bytes(b"no header")
    found = {each.name: each for each in listing(tmp_path)}
    assert [name for name, each in found.items() if not each.faults] == ["whole"]
    wrong = {"cut": "damaged", "words": "damaged", "types": "bad r: 'eight'", "empty": "none of the formats"}
    assert all(words in " ".join(found[name].faults) for name, words in wrong.items())
    assert "damaged" in " ".join(found["file.safetensors"].faults)


def test_every_format_is_listed_and_nothing_else(tmp_path: Path) -> None:
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=4, alpha=8, targets=("attn.q", "attn.v")), name="a")
    many = tmp_path / "many"
    lk.save(model, "a", many / "ours")
    tiny("llama").save_pretrained(many / "base")
    convert(many / "ours", many / "deeper" / "still" / "file.pt", "loralib")
    convert(many / "ours", many / "file.gguf", "gguf", Told(base=str(many / "base")))
    image = {"lora.down": torch.ones(2, 8), "lora.up": torch.ones(8, 2)}
    image = {f"unet.mid_block.attentions.0.to_q.{name}.weight": value for name, value in image.items()}
    save_file(image, many / "image.safetensors")
    (many / "notes.txt").write_text("no adapter")
    (many / ".hidden").mkdir()
    save_file({"weight": torch.ones(2)}, many / "other.safetensors")
    torch.save({"step": torch.ones(1)}, many / "optimiser.pt")
    found = {each.name: each for each in listing(many, Told(alpha=8.0))}
    assert list(found) == ["deeper/still/file.pt", "file.gguf", "image.safetensors", "ours"]
    for name in ("deeper/still/file.pt", "file.gguf", "ours"):
        each = found[name]
        assert (each.ranks, each.scales, each.targets) == ((4,), (2.0,), ("q_proj", "v_proj")), name
        assert each.parameters == found["ours"].parameters and not each.faults
    assert found["ours"].method == "lora" and found["file.gguf"].format == "GGUF adapter"
    assert "alpha" in listing(many)[0].faults[0]


def test_every_method_is_listed_by_its_name(tmp_path: Path) -> None:
    for name in METHODS:
        lk.save(adapted("bert", name), "a", tmp_path / name)
    found = {each.name: each for each in listing(tmp_path)}
    assert set(found) == set(METHODS)
    for name, each in found.items():
        assert not each.faults and each.parameters > 0 and each.method == method_named(name).name, each
    assert found["lora"].ranks and not found["ia3"].ranks


def test_an_empty_folder_has_none_and_no_folder_is_an_error(tmp_path: Path) -> None:
    assert listing(tmp_path) == []
    with pytest.raises(BadAdapterFile, match="no such folder"):
        listing(tmp_path / "nowhere")
