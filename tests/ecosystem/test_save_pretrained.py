"""`save_pretrained` writes the base alone from an attached model, and the merged weights from a merged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import lorakit as lk
from tests.ecosystem.small import keys_of
from tests.laws.cases import adapted, bits, output, same_bits
from tests.tiny import DECODERS, tiny

FAMILIES = ("llama", "gpt2", "bert", "roberta")


def again(family: str, folder: Path) -> PreTrainedModel:
    kind = AutoModelForCausalLM if family in DECODERS else AutoModel
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_saves_its_base_to_the_bit(family: str, shard: str, tmp_path: Path) -> None:
    model = adapted(family, "lora-linear", torch.float32, "a", "b.c")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    saved = set().union(*(keys_of(file) for file in tmp_path.glob("*.safetensors")))
    assert saved <= set(tiny(family).state_dict())
    assert same_bits(bits(again(family, tmp_path)), bits(tiny(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_saves_the_merged_weights(family: str, tmp_path: Path) -> None:
    model = adapted(family, "lora-linear")
    lk.merge(model, "a")
    model.save_pretrained(tmp_path)
    assert torch.equal(output(again(family, tmp_path)), output(model))
    assert not torch.equal(output(model), output(tiny(family)))
    lk.unmerge(model)
    model.save_pretrained(tmp_path)
    assert same_bits(bits(again(family, tmp_path)), bits(tiny(family)))


def test_after_detaching_save_pretrained_is_as_before(tmp_path: Path) -> None:
    model = adapted("llama", "lora", torch.float32, "a", "b")
    for name in ("a", "b"):
        lk.detach(model, name)
        model.save_pretrained(tmp_path / name)
        assert keys_of(tmp_path / name / "model.safetensors") == set(tiny("llama").state_dict())


def test_a_tied_model_saves_its_base_too(tmp_path: Path) -> None:
    model = adapted("llama", "lora", torch.float32, "a", tied=True)
    model.save_pretrained(tmp_path)
    assert same_bits(bits(again("llama", tmp_path)), bits(tiny("llama", tied=True)))
