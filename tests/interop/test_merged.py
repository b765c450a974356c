"""A checkpoint merged on disk is the attached model, and needs memory for a layer, not for a model."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel, PreTrainedModel

import lorakit as lk
from lorakit.errors import BadAdapterFile, BadModel, LorakitError, NotMergeable, OutputExists
from lorakit.interop import merge_checkpoint
from lorakit.models.loading import _Place
from tests.laws.cases import METHODS, adapted, close, every_case, output, scramble, waived
from tests.source import package_files, parsed
from tests.tiny import tiny, tokens


def _base(family: str, folder: Path, **options: object) -> Path:
    tiny(family).save_pretrained(folder, **options)
    return folder


def _again(family: str, folder: Path) -> PreTrainedModel:
    return type(tiny(family)).from_pretrained(folder).eval()


# transformers writes some tensors of these under other names, or in other pieces, than the model has
RENAMED = {"vit": METHODS, "gpt_neox": ("full",), **dict.fromkeys(("mixtral", "qwen3_moe"), ("full", "full-top2"))}


@every_case
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_merged_folder_is_the_attached_model(family: str, method: str, shard: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    lk.save(model, "a", tmp_path / "a")
    base = _base(family, tmp_path / "base", max_shard_size=shard)
    if waived(method, "merge") or method in RENAMED.get(family, ()):
        error, words = (NotMergeable, "cannot be merged") if waived(method, "merge") else (BadModel, "has no weights")
        with pytest.raises(error, match=words):
            merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
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


@pytest.mark.slow
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


def _peft_folder(model: PreTrainedModel, folder: Path, targets: list[str]) -> PreTrainedModel:
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules=targets)).eval()
    for value in theirs.parameters():
        if value.requires_grad:
            value.data += 0.05 * torch.randn_like(value)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.filterwarnings("ignore")
def test_a_peft_folder_with_copies_of_the_base_merges(tmp_path: Path) -> None:
    base = _base("llama", tmp_path / "base")
    theirs = _peft_folder(tiny("llama"), tmp_path / "a", ["embed_tokens", "lm_head", "q_proj"])
    merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert close(output(_again("llama", tmp_path / "out")), output(theirs))
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(BadAdapterFile, match="copy of the base's weight that differs"):
        merge_checkpoint(tmp_path / "other", tmp_path / "a", tmp_path / "again")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_a_tied_weight_is_refused(target: str, tmp_path: Path) -> None:
    tiny("llama", tied=True).save_pretrained(tmp_path / "base")
    _peft_folder(tiny("llama"), tmp_path / "peft", [target])
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=2, targets=target), name="a")
    lk.save(model, "a", tmp_path / "ours")
    for folder in ("ours", "peft"):
        with pytest.raises(LorakitError, match=r"shares its weight with|copy of the base"):
            merge_checkpoint(tmp_path / "base", tmp_path / folder, tmp_path / "out", any_base=True)
    assert not (tmp_path / "out").exists()


def test_other_targets_of_a_tied_model_merge(tmp_path: Path) -> None:
    model = adapted("llama", "lora", tied=True)
    lk.save(model, "a", tmp_path / "a")
    tiny("llama", tied=True).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert close(output(_again("llama", tmp_path / "out")), output(model))


def test_weights_that_the_config_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    model = tiny("bert", labels=3)
    lk.attach(model, lk.LoRA(rank=2, train="classifier"), name="a")
    lk.save(model, "a", tmp_path / "a")
    tiny("bert", labels=2).save_pretrained(tmp_path / "base")
    with pytest.raises(BadModel, match=r"classifier.bias has shape \(2,\) in .*, but the model needs \(3,\)"):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", any_base=True)


INDEX = "model.safetensors.index.json"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "nothing"}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", '{"model_type": "llama", "architectures": 5}'),
        ("config.json", '{"model_type": "llama", "architectures": ["pipeline"]}'),
        ("config.json", '{"model_type": "llama", "architectures": ["PreTrainedModel"]}'),
        (INDEX, "{"),
        (INDEX, "[1]"),
        (INDEX, "{}"),
        (INDEX, '{"weight_map": {"x": 3}}'),
        (INDEX, '{"weight_map": {"x": "../base/model.safetensors"}}'),
        ("model.safetensors", ""),
        ("model.safetensors", "\x7f" * 8 + "{}"),
        ("model.safetensors", "\x02\0\0\0\0\0\0\0[]"),
        ("model.safetensors", '\x0b\0\0\0\0\0\0\0{"x":[1, 2]}'),
    ],
)
def test_a_damaged_base_is_refused_in_a_sentence(name: str, text: str, tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    base = _base("llama", tmp_path / "base")
    (base / name).write_text(text, encoding="latin-1")
    with pytest.raises(BadModel, match=str(base)):
        merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pipeline", "PreTrainedModel", "Trainer", "__version__", "nothing"])
def test_an_adapter_names_no_architecture_but_models(name: str, tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lorakit"])
    header["base"]["architecture"] = name
    save_file(load_file(path), path, metadata={"lorakit": json.dumps(header)})
    with pytest.raises(BadModel, match=f"is a {name}, which transformers"):
        merge_checkpoint(_base("llama", tmp_path / "base"), tmp_path / "a", tmp_path / "out")


def test_code_of_a_model_folder_is_never_run(tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    base = _base("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(BadModel, match="trust_remote_code"):
        merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def _reading_calls() -> list[tuple[str, ast.Call]]:
    """Every call in the package that makes a model, config or tokenizer of what files say, with its place."""
    calls = [(path, node) for path in package_files() for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    return [
        (f"{path.name}:{call.lineno}", call)
        for path, call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("from_pretrained", "from_config")
    ]


def test_every_reading_of_a_model_folder_refuses_its_code() -> None:
    assert _reading_calls()
    for place, call in _reading_calls():
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        shared = words.get(None, "").endswith(".options()")  # models/loading gives every call the same options
        assert shared or words.get("trust_remote_code") == "False", place
    assert not _Place("x", local=True).options()["trust_remote_code"]
