"""A checkpoint merged on disk is the attached model, and needs memory for a layer, not for a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel, PreTrainedModel

import lorakit as lk
from lorakit.errors import BadAdapterFile, BadModel, OutputExists
from lorakit.interop import merge_checkpoint
from tests.laws.cases import adapted, close, every_case, output, scramble
from tests.tiny import tiny, tokens


def _base(family: str, folder: Path, **options: object) -> Path:
    tiny(family).save_pretrained(folder, **options)
    return folder


def _again(family: str, folder: Path) -> PreTrainedModel:
    kind = AutoModelForCausalLM if family in ("llama", "gpt2") else AutoModel
    return kind.from_pretrained(folder).eval()


@every_case
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_merged_folder_is_the_attached_model(family: str, method: str, shard: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    lk.save(model, "a", tmp_path / "a")
    base = _base(family, tmp_path / "base", max_shard_size=shard)
    merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert close(output(_again(family, tmp_path / "out")), output(model))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))


def test_bf16_shards_keep_their_dtype_and_equal_merge(tmp_path: Path) -> None:
    model = adapted("llama", "lora-linear", torch.bfloat16)
    lk.save(model, "a", tmp_path / "a")
    with lk.use(model, None):
        model.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    lk.merge(model, "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_trained_head_joins_a_base_that_has_none(tmp_path: Path) -> None:
    BertModel(tiny("bert").config).eval().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    lk.attach(model, lk.LoRA(rank=2, train="classifier"), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert again.config.num_labels == 3
    assert close(again(tokens(model)).logits, model(tokens(model)).logits)


def test_bad_input_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    base, out = _base("llama", tmp_path / "base"), tmp_path / "out"
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    damaged = _base("llama", tmp_path / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    for bad, error, words in (
        (tmp_path / "other", BadAdapterFile, "another base"),
        (tmp_path / "empty", BadModel, "no safetensors"),
        (tmp_path / "damaged", BadModel, "damaged"),
        (_base("gpt2", tmp_path / "gpt2"), BadAdapterFile, "of the type gpt2"),
    ):
        with pytest.raises(error, match=words):
            merge_checkpoint(bad, tmp_path / "a", out)
        assert not list(tmp_path.glob("*out*"))
    merge_checkpoint(base, tmp_path / "a", out)
    with pytest.raises(OutputExists):
        merge_checkpoint(base, tmp_path / "a", out)


MEASURE = """
import resource, sys, torch, transformers
from pathlib import Path
import lorakit as lk
from lorakit.interop import merge_checkpoint
folder = Path(sys.argv[1])
merge_checkpoint(folder / "small", folder / "small-a", folder / "warm")          # imports, code paths, allocator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_checkpoint(folder / "base", folder / "a", folder / "out")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_merging_needs_at_most_a_quarter_of_the_checkpoint_in_memory(tmp_path: Path) -> None:
    """The model has one shard only, so that no part of the checkpoint is small enough to be read whole."""
    for name, size in (
        ("small", dict()),
        ("", dict(hidden_size=512, intermediate_size=512, num_hidden_layers=24, initializer_range=0.02)),
    ):
        model = tiny("llama", **size)
        model.save_pretrained(tmp_path / (name or "base"))
        lk.attach(model, lk.LoRA(rank=4, targets="linear"), name="a")
        scramble(model, "a")
        lk.save(model, "a", tmp_path / (f"{name}-a" if name else "a"))
    shard = tmp_path / "base" / "model.safetensors"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=environment, check=True, capture_output=True, text=True
    )
    assert shard.stat().st_size > 150e6
    assert int(run.stdout.split()[-1]) < shard.stat().st_size / 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert close(output(again), output(model))


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    merge_checkpoint(_base("llama", tmp_path / "base", max_shard_size="20KB"), tmp_path / "a", tmp_path / "out")
    ours = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
