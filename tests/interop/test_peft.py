"""PEFT folders go through an exchange byte for byte, whatever wrote them; a portable one is the same update."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.core.exchange import Exchange, factored
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, LorakitError, OutputExists
from lorakit.interop import Told, convert, read
from lorakit.interop._folding import error
from tests.laws.cases import adapted, close, every_case, method_named, output
from tests.laws.test_peft import CONFIGS
from tests.methods.oracle import read_by_peft, written_by_peft
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

EXPERTS = dict(target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"])
MORE: dict[str, tuple[str, PeftConfig]] = {
    "dora": ("llama", LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"])),
    "lora-bias": ("llama", LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"])),
    "head": ("bert", LoraConfig(r=4, target_modules=["query"], modules_to_save=["pooler"])),
    "tokens": ("llama", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 3])),
    "experts": ("mixtral", LoraConfig(r=4, **EXPERTS)),
    "adalora": ("llama", AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10)),
    "ia3": ("llama", IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
}
ALL = {case: (family, LoraConfig(lora_alpha=8, **fields)) for case, (family, fields) in CONFIGS.items()} | MORE
ADDED = [case for case in ALL if case not in ("ia3", "dora", "lora-bias", "tokens", "head")]


@pytest.mark.parametrize("case", ALL)
def test_what_peft_wrote_is_only_renamed(case: str, tmp_path: Path) -> None:
    family, config = ALL[case]
    theirs = written_by_peft(family, config, tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "ours", "peft") == []
    before, after = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    if case != "adalora":  # which PEFT refuses to load for inference after training was prepared
        assert close(output(read_by_peft(family, tmp_path / "ours")), output(theirs), 1e-5)


@every_case
def test_what_lorakit_wrote_comes_back_byte_for_byte(family: str, method: str, tmp_path: Path) -> None:
    lk.save(adapted(family, method), "a", tmp_path / "a")
    if not method_named(method).peft_type and not read(tmp_path / "a").config.get("peft_type"):
        return
    convert(tmp_path / "a", tmp_path / "b", "peft")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    told, again = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("a", "b"))
    assert told == {key: again[key] for key in told}


@pytest.mark.parametrize("case", ADDED)
def test_factors_are_the_change_of_the_merged_weights(case: str, tmp_path: Path) -> None:
    family, config = ALL[case]
    theirs = written_by_peft(family, config, tmp_path / "a")
    found = factored(read(tmp_path / "a"))
    assert found
    base, merged = tiny(family).state_dict(), _merged(theirs)
    for each in found:
        a_RI, b_OR = each.read()
        assert (len(b_OR), a_RI.shape[1]) == each.shape and len(a_RI) == each.rank
        stored, number = each.path, each.name.removeprefix(each.path).strip("[]")
        key = stored if number else f"{stored}.weight"
        change = (merged[key] - base[key])[int(number) if number else ...]
        change = change.T if family == "gpt2" or "embed" in each.path else change  # how Conv1D and Embedding keep it
        assert close(b_OR @ a_RI, change, 1e-4), each.name


def _merged(theirs: PeftModel) -> dict[str, torch.Tensor]:
    model: PreTrainedModel = theirs.merge_and_unload()
    return model.state_dict()


@pytest.mark.parametrize("case", ["plain", "patterns", "rslora", "embedding", "gpt2", "qwen2", "adalora"])
def test_a_portable_folder_is_the_same_adapter(case: str, tmp_path: Path) -> None:
    family, config = ALL[case]
    theirs = written_by_peft(family, config, tmp_path / "theirs")
    copies = case == "embedding"
    if copies:  # PEFT copies the base's embedding into the file; only a comparison tells that it is one
        with pytest.raises(BadAdapterFile, match="in place of the base's own"):
            convert(tmp_path / "theirs", tmp_path / "out", "portable")
        assert not (tmp_path / "out").exists()
        tiny(family).save_pretrained(tmp_path / "base")
    told = Told(base=str(tmp_path / "base")) if copies else None
    notes = convert(tmp_path / "theirs", tmp_path / "out", "portable", told)
    assert any("the base has the same: model.embed_tokens.weight" in note for note in notes) == copies
    told, tensors = json.loads((tmp_path / "out" / CONFIG).read_text()), load_file(tmp_path / "out" / TENSORS)
    assert told["r"] == told["lora_alpha"] == max(v.shape[0] for k, v in tensors.items() if "A" in k.split("lora_")[1])
    assert not (told["rank_pattern"] or told["alpha_pattern"] or told["use_rslora"])
    assert float(notes[-1].split()[-1]) <= 1e-6
    assert close(output(read_by_peft(family, tmp_path / "out")), output(theirs), 1e-5)
    model = tiny(family)
    lk.load(model, tmp_path / "out", "out")
    assert close(output(model), output(theirs), 1e-5)


@pytest.mark.parametrize("case", ["dora", "lora-bias", "head", "tokens", "experts", "ia3"])
def test_what_not_every_reader_knows_is_no_portable_folder(case: str, tmp_path: Path) -> None:
    family, config = ALL[case]
    written_by_peft(family, config, tmp_path / "a")
    with pytest.raises(BadAdapterFile, match=r"not every reader knows|DoRA|no low-rank updates"):
        convert(tmp_path / "a", tmp_path / "out", "portable")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_is_a_power_of_two_is_folded_exactly_in_16_bits(tmp_path: Path) -> None:
    update = read(_saved(tmp_path / "a")).updates[0]
    low = replace(update, b=value_of(update.b.read().bfloat16()))
    for alpha, exact in ((update.rank * 0.5, True), (update.rank * 2.0, True), (update.rank * 0.3, False)):
        changed = replace(low, alpha=alpha)
        assert (error(changed, changed.scale) == 0.0) is exact
        assert error(changed, changed.scale) < 1e-7  # as then it is kept in float32


def _saved(folder: Path) -> Path:
    lk.save(adapted("llama", "lora"), "a", folder)
    return folder


def test_old_names_and_pickles_are_read(tmp_path: Path) -> None:
    theirs = written_by_peft("llama", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path / "new")
    tensors, told = load_file(tmp_path / "new" / TENSORS), (tmp_path / "new" / CONFIG).read_text()
    dressed = {
        "unprefixed": lambda key: key.removeprefix("base_model.model."),
        "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        "parallel": lambda key: f"module.{key}",
        "named": lambda key: key.replace(".weight", ".default.weight"),
        "sharded": lambda key: key.replace("base_model.", "base_model._fsdp_wrapped_module."),
    }
    expected = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    for name, dress in dressed.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text(told)
        torch.save({dress(key): value for key, value in tensors.items()}, tmp_path / name / "adapter_model.bin")
        found = read(tmp_path / name)
        for update in found.updates:
            assert torch.equal(update.a.read(), expected[f"{update.path}.lora_A.weight"])
        assert len(found.updates) * 2 == len(expected) and not found.whole
        model = tiny("llama")
        lk.load(model, tmp_path / name, name)
        assert close(output(model), output(theirs))


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    theirs = written_by_peft("llama", LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / TENSORS)
    del theirs

    def broken(words: str, values: dict[str, torch.Tensor] | None = None, **fields: object) -> None:
        folder = tmp_path / f"broken-{abs(hash(words))}"
        folder.mkdir()
        save_file(tensors if values is None else values, folder / TENSORS, {"format": "pt"})
        told = json.loads((tmp_path / "a" / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps(told))
        with pytest.raises(BadAdapterFile, match=words):
            convert(folder, tmp_path / "out", "peft")
        assert not (tmp_path / "out").exists()

    first = next(iter(tensors))
    broken("lacks its A", {key: value for key, value in tensors.items() if key != first})
    broken("not finite", {key: value * math.nan for key, value in tensors.items()})
    broken("has rank 4, but the config says 8", r=8)
    broken("began as pissa", init_lora_weights="pissa")
    broken("pattern '\\(' cannot be read", rank_pattern={"(": 3})
    with pytest.raises(OutputExists):
        convert(tmp_path / "a", tmp_path / "a", "peft")
    with pytest.raises(BadAdapterFile, match="no such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(BadAdapterFile, match="none of the formats"):
        read(tmp_path)
    with pytest.raises(LorakitError, match="no low-rank updates"):
        factored(Exchange("peft", ()))
    with pytest.raises(LorakitError, match="above the 2 asked for"):
        convert(tmp_path / "a", tmp_path / "out", "portable", Told(rank=2))


def test_a_rank_above_the_matrix_is_refused(tmp_path: Path) -> None:
    update = read(_saved(tmp_path / "a")).updates[0]
    rank = min(update.sides) + 1
    a, b = torch.ones(rank, update.sides[1]), torch.ones(update.sides[0], rank)
    large = replace(update, a=value_of(a), b=value_of(b))
    with pytest.raises(BadAdapterFile, match=f"rank {rank}, more than its matrix"):
        factored(Exchange("peft", (large,)))


def test_blocks_that_an_older_transformers_kept_elsewhere_are_found(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], alpha_pattern={"layers.1.self_attn.q_proj": 3})
    theirs = written_by_peft("llama", config, tmp_path / "a")
    path, old = tmp_path / "a" / TENSORS, "base_model.model.language_model.model.layers."
    tensors = {key.replace("base_model.model.model.layers.", old): value for key, value in load_file(path).items()}
    assert any(key.startswith(old) for key in tensors)
    save_file(tensors, path, {"format": "pt"})
    model = tiny("llama")
    lk.load(model, tmp_path / "a", "a")
    assert close(output(model), output(theirs))


MEASURE = """
import resource, sys
from lorakit.interop import convert
convert(sys.argv[1] + "/small", sys.argv[1] + "/small-out", "portable")  # what the import and the first use cost
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1] + "/large", sys.argv[1] + "/out", sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "portable"])
def test_converting_holds_a_tensor_at_a_time(to: str, tmp_path: Path) -> None:
    for name, width, layers in (("small", 8, 1), ("large", 50_000, 24)):
        made = {
            f"base_model.model.layers.{n}.q.lora_{side}.weight": torch.randn(*shape)
            for n in range(layers)
            for side, shape in {"A": (16, width), "B": (width, 16)}.items()
        }
        (tmp_path / name).mkdir()
        save_file(made, tmp_path / name / TENSORS, {"format": "pt"})
        told = {"peft_type": "LORA", "r": 16, "lora_alpha": 20, "target_modules": ["q"]}
        (tmp_path / name / CONFIG).write_text(json.dumps(told))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), to]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    size = (tmp_path / "large" / TENSORS).stat().st_size
    assert size > 150e6
    assert int(run.stdout.split()[-1]) < size / 4
