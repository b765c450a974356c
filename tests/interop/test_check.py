"""What is said of PEFT is what PEFT does; what a conversion mends is gone after it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit as lk
from lorakit.core.exchange import Exchange, Update
from lorakit.core.values import value_of
from lorakit.errors import UnknownName
from lorakit.interop import Told, convert, read
from lorakit.interop.check import Finding, check, is_usable
from lorakit.interop.consumers import peft, vllm
from tests.laws.cases import METHODS, adapted, close, output
from tests.methods.oracle import read_by_peft, written_by_peft
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PROGRAMS = ("vllm", "sglang", "llama.cpp", "peft")
HERE = Path("reviews")
Tensors = dict[str, Tensor]


def written(folder: Path, family: str = "llama", **fields: Any) -> tuple[Path, Tensor]:
    """A folder of PEFT's, and what its model makes of it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | fields)
    return folder, output(written_by_peft(family, config, folder))


def told(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config; ... takes one out."""
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def renamed(folder: Path, change: Callable[[str], str | None]) -> Path:
    """The folder with other names of its tensors; None takes one out."""
    tensors = {change(key): value for key, value in load_file(folder / TENSORS).items()}
    save_file({key: value for key, value in tensors.items() if key}, folder / TENSORS, {"format": "pt"})
    return folder


def seen_by(program: str, folder: Path) -> list[Finding]:
    return check(read(folder), folder, program)


def grades(found: list[Finding]) -> list[str]:
    return [each.grade for each in found]


def made(*updates: Update, **config: Any) -> Exchange:
    """An exchange with a sound config, but for the fields given."""
    sound = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    return Exchange("peft", updates, base="base", config=sound | {"base_model_name_or_path": "base"} | config)


def update(path: str = "layers.0.q_proj", rank: int = 2, alpha: float | None = None, **fields: Any) -> Update:
    """One layer's, of scale 1 unless an alpha is given."""
    a, b = torch.ones(rank, 4), torch.ones(4, rank)
    stacked = fields.get("form") == "experts"
    return Update(path, value_of(a[None] if stacked else a), value_of(b[None] if stacked else b),
                  float(rank if alpha is None else alpha), **fields)  # fmt: skip


WHAT_PEFT_DOES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[str], str | None], str]] = {
    # how it was trained, what was changed in its config and names, and what is found
    "sound": ({}, {}, str, ""),
    "rslora": ({"use_rslora": True}, {}, str, ""),
    "dora": ({"use_dora": True}, {}, str, ""),
    "head": ({"modules_to_save": ["lm_head"]}, {}, str, ""),
    "unprefixed": ({}, {}, lambda key: key.removeprefix(PREFIX), "wrong"),
    "compiled": ({}, {}, lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), "wrong"),
    "named": ({}, {}, lambda key: key.replace(".weight", ".default.weight"), "ignores"),
    "other targets": ({}, {"target_modules": ["q_proj"]}, str, "wrong"),
    "no magnitudes told": ({"use_dora": True}, {"use_dora": False}, str, "wrong"),
    "no bias of B told": ({"lora_bias": True}, {"lora_bias": False}, str, "wrong"),
    "another method": ({}, {"peft_type": "DYNAMIC"}, str, "refuses"),
    "no method": ({}, {"peft_type": ...}, str, "refuses"),
    "head missing": ({"modules_to_save": ["lm_head"]}, {}, lambda key: None if "head" in key else key, "refuses"),
}


@pytest.mark.parametrize("case", WHAT_PEFT_DOES)
def test_what_is_said_of_peft_is_what_it_does(case: str, tmp_path: Path) -> None:
    fields, changed, change, grade = WHAT_PEFT_DOES[case]
    folder, meant = written(tmp_path / "a", **fields)
    renamed(told(folder, **changed), change)
    assert grades(seen_by("peft", folder)) == ([grade] if grade else [])
    if grade == "refuses":
        with pytest.raises((KeyError, ValueError)):
            read_by_peft("llama", folder)
    else:
        assert close(output(read_by_peft("llama", folder)), meant) is (grade != "wrong")


def test_what_peft_writes_into_the_base_is_told(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "head", modules_to_save=["lm_head"])
    told(folder, modules_to_save=None)
    assert grades(seen_by("peft", folder)) == ["wrong"]
    assert _changed("llama", folder) == ["lm_head.weight"]
    folder, _ = written(tmp_path / "bias", "gpt2", target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    found = seen_by("peft", folder)
    assert grades(found) == ["ignores"] and is_usable(found)
    changed = _changed("gpt2", folder)
    assert changed and all(name.endswith(".bias") for name in changed)


def _changed(family: str, folder: Path) -> list[str]:
    """The base's own tensors that are others once PEFT has loaded an adapter."""
    after = read_by_peft(family, folder).unload().state_dict()
    return [name for name, value in tiny(family).state_dict().items() if not torch.equal(after[name], value)]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_takes_starts_by_factors_off_the_base(start: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "a", init_lora_weights=start)
    assert _changed("llama", folder)
    found = made(update(), init_lora_weights=start)
    assert all("wrong" in grades(check(found, HERE, program)) for program in ("sglang", "llama.cpp", "peft"))
    assert "refuses" in grades(check(found, HERE, "vllm"))


def test_dropout_on_stacked_experts_is_refused_by_peft(tmp_path: Path) -> None:
    stacked = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    folder, _ = written(tmp_path / "a", "mixtral", **stacked)
    assert seen_by("peft", folder) == []
    found = seen_by("peft", told(folder, lora_dropout=0.1))
    assert grades(found) == ["refuses"] and "lora_dropout=0.1" in found[0].what
    with pytest.raises(ValueError, match="dropout"):
        read_by_peft("mixtral", folder)


def test_sorting_patterns_changes_which_one_counts(tmp_path: Path) -> None:
    """PEFT sorts them when it saves: what was given last may then match first."""
    given = {"v_proj": 32.0, "layers.0.self_attn.v_proj": 4.0}
    folder, meant = written(tmp_path / "a", alpha_pattern=given)
    found = seen_by("peft", folder)  # sorted already
    assert grades(found) == ["ignores"] and is_usable(found)
    assert not close(output(read_by_peft("llama", folder)), meant)
    found = seen_by("peft", told(folder, alpha_pattern=given))  # as it was given
    assert close(output(read_by_peft("llama", folder)), meant)
    assert grades(found) == ["wrong"]
    assert "0.125 times the trained update in model.layers.0.self_attn.v_proj" in found[0].what


@pytest.mark.parametrize("kind", [AdaLoraConfig(target_modules=["q_proj"], total_step=10), IA3Config(
    target_modules=["k_proj"], feedforward_modules=[])], ids=["adalora", "ia3"])  # fmt: skip
def test_other_types_are_for_peft_alone(kind: PeftConfig, tmp_path: Path) -> None:
    written_by_peft("llama", kind, tmp_path / "a")
    assert seen_by("peft", tmp_path / "a") == []
    for program in ("vllm", "sglang", "llama.cpp"):
        assert "refuses" in grades(seen_by(program, tmp_path / "a")), program


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_judged_as_peft_takes_it(method: str, tmp_path: Path) -> None:
    ours = adapted("bert", method)
    lk.save(ours, "a", tmp_path / "a")
    found = seen_by("peft", tmp_path / "a")
    if "refuses" in grades(found):
        with pytest.raises((KeyError, ValueError)):
            read_by_peft("bert", tmp_path / "a")
    else:
        assert close(output(read_by_peft("bert", tmp_path / "a")), output(ours), 1e-4) is is_usable(found)
    held = read(tmp_path / "a")
    is_plain = bool(held.updates) and not held.whole and all(len(each.values) == 2 for each in held.updates)
    assert is_usable(seen_by("vllm", tmp_path / "a")) is is_plain
    for program in ("sglang", "llama.cpp"):  # Bert's layers are no layers.N., and it names no base
        found += seen_by(program, tmp_path / "a")
        assert not is_usable(found)
    assert not ("merge" in METHODS[method].waives and any(each.mend.startswith("lorakit merge") for each in found))


def test_all_types_of_peft_are_known() -> None:
    assert set(peft.KINDS.pattern.split("|")) == {kind.value for kind in PeftType}


def test_adapters_in_folders_of_the_folder_are_not_read(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "a")
    written(folder / "other")
    (found,) = seen_by("peft", folder)
    assert (found.grade, "subfolder='other'" in found.mend) == ("ignores", True)


def test_a_head_that_is_the_embedding_is_changed_with_it_when_peft_merges(tmp_path: Path) -> None:
    for tied in (True, False, None):
        base = tmp_path / str(tied)
        base.mkdir()
        (base / "config.json").write_text(json.dumps({} if tied is None else {"tie_word_embeddings": tied}))
        found = replace(made(update("lm_head"), target_modules=["lm_head"]), base=str(base))
        assert ("wrong" in grades(check(found, HERE, "peft"))) is bool(tied)
        assert grades(check(found, HERE, "llama.cpp")) == {True: ["refuses"], False: [], None: ["fine"]}[tied]


ROOTED = update(rank=4, alpha=8.0, rooted=True)
SAID: dict[str, tuple[str, Exchange, str, str]] = {  # a program, an adapter, its grade, and what is said
    "vllm: rslora": ("vllm", made(ROOTED, r=4, lora_alpha=8, use_rslora=True), "", ""),
    "sglang: rslora": ("sglang", made(ROOTED, update("layers.0.v_proj", 4, 8.0, rooted=True), r=4,
                       lora_alpha=8, use_rslora=True), "wrong", r"whatever use_rslora say.* 0\.5 times .* and 1 more"),
    "llama.cpp: rslora": ("llama.cpp", made(ROOTED, r=4, lora_alpha=8, use_rslora=True), "wrong", r": 0\.5 times the"),
    "llama.cpp: ranks": ("llama.cpp", made(update(rank=4, alpha=2.0), rank_pattern={"q_proj": 4}), "", ""),
    "llama.cpp: alphas": ("llama.cpp", made(update(alpha=8.0), alpha_pattern={"q_proj": 8}), "wrong", r"0\.25 times"),
    "llama.cpp: no alpha": ("llama.cpp", made(update(alpha=0.0), update("b", alpha=4.0), alpha_pattern={"b": 4},
                            lora_alpha=0), "wrong", r"0\.5 times .* b$"),
    "vllm: alphas": ("vllm", made(update(alpha=8.0), alpha_pattern={"q_proj": 8}), "ignores", r"0\.26 .*: 0\.25 times"),
    "vllm: rank 17": ("vllm", made(update(rank=17), r=17, lora_alpha=17), "refuses", "rank 17, above the 16"),
    "vllm: pattern": ("vllm", made(update(), rank_pattern={"o_proj": 70}), "refuses", "rank 70"),
    "vllm: rank 600": ("vllm", made(update(rank=600), r=600, lora_alpha=600), "refuses", "largest choice is 512"),
    "vllm: fields": ("vllm", replace(made(update(alpha=8.0)), config={"r": 2}), "refuses", "lora_alpha, target"),
    "vllm: no bias told": ("vllm", made(update(), bias=None), "refuses", "bias=None"),
    "vllm: embedding whole": ("vllm", made(update(), modules_to_save=["embed_tokens"]), "refuses", "embed_tokens$"),
    "vllm: head": ("vllm", made(update(), modules_to_save=["score"]), "fine", "trained score"),
    "vllm: two heads": ("vllm", made(update(), modules_to_save=["score", "classifier"]), "refuses", "classifier$"),
    "vllm: dora": ("vllm", made(update(magnitude=value_of(torch.ones(4)))), "refuses", "no DoRA: layers.0.q_proj"),
    "vllm: convolution": ("vllm", made(update(form="convolution")), "refuses", "no convolutions"),
    "vllm: experts": ("vllm", made(update("layers.0.experts.up", form="experts")), "fine", "stacked experts"),
    "vllm: embedding": ("vllm", made(update("embed_tokens", form="embedding")), "fine", "vocabulary.* embed_tokens$"),
    "vllm: start": ("vllm", made(update(), init_lora_weights="eva"), "", ""),
    "vllm: other start": ("vllm", made(update(), init_lora_weights="loftq"), "refuses", "init_lora_weights='loftq'"),
    "vllm: alora": ("vllm", made(update(), alora_invocation_tokens=[1]), "refuses", r"alora_invocation_tokens=\[1\]"),
    "sglang: q alone": ("sglang", made(update()), "refuses", "layers.0.q_proj$"),
    "sglang: k alone": ("sglang", made(update("layers.0.k_proj")), "refuses", "layers.0.k_proj$"),
    "sglang: q and v": ("sglang", made(update(), update("layers.0.v_proj")), "", ""),
    "sglang: up alone": ("sglang", made(update("layers.0.up_proj")), "refuses", "up_proj$"),
    "sglang: gate alone": ("sglang", made(update("layers.0.gate_proj")), "", ""),
    "sglang: regex": ("sglang", made(update("layers.0.o_proj"), target_modules=".*o_proj"), "refuses", "takes a list"),
    "sglang: every": ("sglang", made(update("layers.0.o_proj"), target_modules="all-linear"), "", ""),
    "sglang: ranks": ("sglang", made(update("layers.0.o_proj", 4, 4.0)), "refuses", "room for r=2"),
    "sglang: unnumbered": ("sglang", made(update("h.0.c_attn")), "wrong", "leaves out .* h.0.c_attn"),
    "sglang: head": ("sglang", made(update("lm_head")), "", ""),
    "sglang: experts": ("sglang", made(update("layers.0.experts.up", form="experts")), "refuses", "one by one"),
    "llama.cpp: experts": ("llama.cpp", made(update("layers.0.experts.up", form="experts")), "refuses", "no place for"),
    "llama.cpp: Conv1D": ("llama.cpp", made(update("h.0.c_attn"), fan_in_fan_out=True), "refuses", "turns A and B"),
    "llama.cpp: base": ("llama.cpp", made(update(), base_model_name_or_path=None), "refuses", "or --base"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_is_said_of_other_programs(case: str) -> None:
    program, exchange, grade, words = SAID[case]
    found = check(exchange, HERE, program)
    assert grades(found) == ([grade] if grade else [])
    assert all(re.search(words, each.what) for each in found)


@pytest.mark.parametrize("name", ["q_proj.bias", "input_layernorm.weight", "", "score.weight"])
def test_sglang_has_no_place_for_what_was_trained_whole(name: str) -> None:
    path = f"layers.0.{name}" if name and "score" not in name else name
    whole = {path: value_of(torch.ones(4))} if path else {}
    found = check(replace(made(update("layers.0.o_proj")), whole=whole), HERE, "sglang")
    assert grades(found) == ([] if not name else ["refuses" if "norm" in name else "wrong"])


def test_the_rank_that_vllm_is_told_is_its_least_that_is_enough() -> None:
    for rank in range(17, 512, 31):
        (found,) = check(made(update(rank=rank), r=rank, lora_alpha=rank), HERE, "vllm")
        given = int(found.mend.rsplit(" ", 1)[1])
        assert given >= rank and not any(rank <= other < given for other in vllm.RANKS)


@pytest.mark.parametrize(("key", "program", "grade"), [
    ("model.norm.weight", "vllm", "refuses"),
    ("layers.0.q_proj.token_adapter.trainable_tokens_delta", "vllm", "refuses"),
    ("_orig_mod.layers.0.q_proj.lora_A.weight", "vllm", "wrong"),
    ("model.embed_tokens.base_layer.weight", "vllm", ""),
    ("model.norm.weight", "llama.cpp", "wrong"),
    ("lm_head.weight", "llama.cpp", "refuses"),
    ("model.embed_tokens.base_layer.weight", "llama.cpp", ""),
])  # fmt: skip
def test_names_that_a_program_cannot_tell(key: str, program: str, grade: str, tmp_path: Path) -> None:
    save_file({PREFIX + key: torch.ones(2, 2), f"{PREFIX}q.lora_A.weight": torch.ones(2, 2)}, tmp_path / TENSORS)
    assert grades(check(made(update()), tmp_path, program)) == ([grade] if grade else [])


FAMILIES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.0.self_attn.v_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "wide": ("llama", {"r": 24}),
    "adalora": ("llama", None),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_rslora": True, "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_what_a_conversion_mends_is_gone_after_it(case: str, tmp_path: Path) -> None:
    """The command of each mend is run; the program takes what comes out, but for what no conversion mends."""
    family, fields = FAMILIES[case]
    tiny(family).save_pretrained(tmp_path / "base")
    if fields is None:
        config = AdaLoraConfig(init_r=4, target_modules=["q_proj", "v_proj"], total_step=9)
        written_by_peft(family, config, tmp_path / "a")
    else:
        written(tmp_path / "a", family, **fields)
    folder = told(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    mends = {program: {each.mend for each in seen_by(program, folder)} for program in PROGRAMS}
    commands = {mend for found in mends.values() for mend in found if mend.startswith("lorakit convert ")}
    assert bool(commands) is (case not in ("plain", "wide"))
    for command in commands:
        _, _, source, _, out, _, to, *base = shlex.split(command)
        convert(source, out, to, Told(base=base[1] if base else None))
    for program, found in mends.items():
        for command in found & commands:
            place = Path(shlex.split(command)[4])
            left = check(read(place, Told(base=str(tmp_path / "base"))), place, program)
            assert not any(each.mend.startswith("lorakit convert ") for each in left), (program, left)


def test_what_is_no_conversions_to_mend_is_merged() -> None:
    dora = made(update("layers.0.o_proj", magnitude=value_of(torch.ones(4))), target_modules=["o_proj"], use_dora=True)
    for program in ("vllm", "sglang"):
        (found,) = check(dora, HERE, program)
        assert found.mend.startswith("lorakit merge reviews --out ")
    assert check(dora, HERE, "peft") == []


def test_other_formats_are_for_nobody_but_llama_cpp() -> None:
    gguf = replace(made(update()), format="gguf", config={})
    assert check(gguf, Path("a.gguf"), "llama.cpp") == []
    for program in ("vllm", "sglang", "peft"):
        (found,) = check(gguf, Path("a.gguf"), program)
        assert found.grade == "refuses" and found.mend.startswith("lorakit convert a.gguf -o a.gguf-p")
    (found,) = check(replace(made(update()), config={}), HERE, "vllm")  # only lorakit's header, no config
    assert CONFIG in found.what


def test_the_worst_is_told_first_and_unknown_programs_are_named() -> None:
    found = check(made(ROOTED, use_dora=True, r=4, lora_alpha=8), HERE, "sglang")
    assert grades(found) == ["refuses", "refuses", "wrong"] and not is_usable(found)
    with pytest.raises(UnknownName, match="did you mean vllm"):
        check(made(), HERE, "vlm")


def test_what_lorakit_saves_is_for_every_program(tmp_path: Path) -> None:
    model = tiny("llama")
    lk.attach(model, lk.LoRA(rank=4, targets=("attn.q", "attn.v")), name="a")
    lk.save(model, "a", tmp_path / "a")
    folder = told(tmp_path / "a", base_model_name_or_path="base")
    assert {program: seen_by(program, folder) for program in PROGRAMS} == {program: [] for program in PROGRAMS}
