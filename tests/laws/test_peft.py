"""PEFT loads what we write, and we load what PEFT writes, with the same logits."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit as lk
from lorakit.core.plan import Placement
from lorakit.core.state import attached_to
from lorakit.errors import BadAdapterFile
from tests.laws.cases import STACKED, adapted, close, every_case, method_named, output, scramble
from tests.tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


@every_case
def test_peft_loads_what_we_write(family: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    lk.save(model, "a", tmp_path / "a")
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"]
    if not method_named(method).peft_type or told != method_named(method).peft_type:
        with pytest.raises(KeyError):  # PEFT has no such type (or not on such layers), and says so
            PeftModel.from_pretrained(tiny(family), tmp_path / "a")
        return
    if family in STACKED and transformers.__version__ < "5.2":
        return  # PEFT itself cannot load into such a model there
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path / "a").eval()
    expected = output(model)
    assert close(output(theirs)[:, -expected.shape[1] :], expected)  # PEFT's logits may begin with those of a prefix


def test_slices_with_scales_of_their_own_survive_the_block(tmp_path: Path) -> None:
    model = tiny("gpt2")
    lk.attach(model, lk.LoRA(rank=4, targets="attention", ranks={"attn.k": 2}, alphas={"attn.v": 3.0}), name="a")
    scramble(model, "a")
    lk.save(model, "a", tmp_path / "a")
    again = tiny("gpt2")
    lk.load(again, tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "a").eval()
    assert close(output(again), output(model))
    assert close(output(theirs), output(model))


CONFIGS = {
    "plain": ("llama", dict(r=4, target_modules=["q_proj", "v_proj"])),
    "patterns": (
        "llama",
        dict(
            r=4,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            alpha_pattern={"down_proj": 3},
        ),
    ),
    "rslora": ("llama", dict(r=4, use_rslora=True, target_modules="all-linear")),
    "regex": ("llama", dict(r=4, target_modules=r".*layers\.1\..*(up|gate)_proj")),
    "embedding": ("llama", dict(r=4, target_modules=["embed_tokens", "q_proj"])),
    "gpt2": ("gpt2", dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2-wte": ("gpt2", dict(r=4, target_modules=["wte", "c_fc"], fan_in_fan_out=True)),
    "bert": ("bert", dict(r=4, target_modules=["query", "value"], bias="lora_only")),
    "bert-all-bias": ("bert", dict(r=4, target_modules=["query"], bias="all")),
    "roberta": ("roberta", dict(r=4, target_modules="all-linear")),
    "qwen2": ("qwen2", dict(r=4, target_modules=["q_proj", "o_proj"])),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_we_load_what_peft_writes(case: str, tmp_path: Path) -> None:
    family, fields = CONFIGS[case]
    theirs = get_peft_model(tiny(family), LoraConfig(lora_alpha=8, **fields)).eval()
    _scramble_peft(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = tiny(family)
    lk.load(model, tmp_path / "a")
    assert close(output(model), output(theirs))
    lk.save(model, "a", tmp_path / "b")  # and back again
    back = PeftModel.from_pretrained(tiny(family), tmp_path / "b").eval()
    assert close(output(back), output(theirs))


@torch.no_grad()
def _scramble_peft(model: nn.Module) -> None:
    for value in model.parameters():
        if value.requires_grad:
            value += 0.05 * torch.randn_like(value)


def test_a_classifier_with_its_head_comes_over(tmp_path: Path) -> None:
    for family in ("bert", "roberta"):
        config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
        theirs = get_peft_model(tiny(family, labels=3), config).eval()
        _scramble_peft(theirs)
        theirs.save_pretrained(tmp_path / family)
        model = tiny(family, labels=3)
        lk.load(model, tmp_path / family, "a")
        assert close(output(model), output(theirs))
        lk.save(model, "a", tmp_path / f"{family}-back")
        back = PeftModel.from_pretrained(tiny(family, labels=3), tmp_path / f"{family}-back").eval()
        assert close(output(back), output(theirs))


def test_several_adapters_of_one_peft_model(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    theirs = get_peft_model(tiny("llama"), config, adapter_name="one").eval()
    theirs.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name in ("one", "two"):
        theirs.set_adapter(name)
        _scramble_peft(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny("llama")
    for name in ("one", "two"):
        lk.load(model, tmp_path / name)
        theirs.set_adapter(name)
        assert close(output(model), output(theirs))


def test_reordered_patterns_are_settled_by_the_tensors(tmp_path: Path) -> None:
    """PEFT sorts patterns on save and takes the first match on load; it cannot reload this file itself."""
    patterns = {"layers.0.self_attn.q_proj": 8, "0.self_attn.q_proj": 2}
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj"],
        rank_pattern=patterns,
        alpha_pattern={k: 8 * v for k, v in patterns.items()},
    )
    theirs = get_peft_model(tiny("llama"), config).eval()
    _scramble_peft(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = tiny("llama")
    lk.load(model, tmp_path / "a", "a")
    assert close(output(model), output(theirs))


def test_a_rank_that_no_pattern_explains_is_a_fault(tmp_path: Path) -> None:
    theirs = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"r": 8}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadAdapterFile, match="has rank 4, but the config says 8"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_what_we_cannot_read_is_named(tmp_path: Path) -> None:
    activated = dict(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    for number, (fields, words) in enumerate(
        [(activated, "activated LoRA"), (dict(lora_bias=True), "a bias on lora_B")]
    ):
        theirs = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"], **fields))
        theirs.save_pretrained(tmp_path / str(number))
        with pytest.raises(BadAdapterFile, match=words):
            lk.load(tiny("llama"), tmp_path / str(number))


def test_a_fused_qkv_adapter_is_attn_qkv(tmp_path: Path) -> None:
    get_peft_model(tiny("gpt2"), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
        tmp_path / "a"
    )
    model = tiny("gpt2")
    lk.load(model, tmp_path / "a", "a")
    plan: tuple[Placement, ...] = attached_to(model, "a").plan
    assert {placement.role for placement in plan} == {"attn.qkv"}


def test_five_steps_of_adamw_equal_pefts(tmp_path: Path) -> None:
    encoder = ["query", "output.dense"]
    for family, targets in (
        ("llama", ["q_proj", "down_proj"]),
        ("gpt2", ["c_attn"]),
        ("bert", encoder),
        ("roberta", encoder),
    ):
        theirs = get_peft_model(
            tiny(family), LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=family == "gpt2")
        )
        theirs.save_pretrained(tmp_path / family)
        ours = tiny(family)
        lk.load(ours, tmp_path / family, "a", trainable=True)
        ids, start = tokens(ours), {k: v.clone() for k, v in ours.state_dict().items() if ".adapters." in k}
        for model, values in (
            (theirs, [p for p in theirs.parameters() if p.requires_grad]),
            (ours, lk.parameters(ours)),
        ):
            optimizer = torch.optim.AdamW(values, lr=1e-3)
            for _ in range(5):
                model(input_ids=ids)[0].pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        lk.save(ours, "a", tmp_path / f"{family}-ours")
        trained = PeftModel.from_pretrained(tiny(family), tmp_path / f"{family}-ours")
        assert any(not torch.equal(v, ours.state_dict()[k]) for k, v in start.items())
        for one, other in zip(_updates(trained), _updates(theirs), strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm()


def _updates(model: nn.Module) -> list[torch.Tensor]:
    return [m.get_delta_weight("default").detach() for m in model.modules() if hasattr(m, "get_delta_weight")]


def test_conv2d_goes_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU()), torch.randn(2, 3, 8, 8)
    model = copy.deepcopy(base)
    lk.attach(model, lk.LoRA(rank=2, targets="0"), name="a")
    scramble(model, "a")
    with warnings.catch_warnings():
        lk.save(model, "a", tmp_path / "a")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    assert close(theirs(x), model(x))
    theirs.save_pretrained(tmp_path / "b")
    again = copy.deepcopy(base)
    lk.load(again, tmp_path / "b")
    assert close(again(x), model(x))


def _written_by_peft(family: str, folder: Path, *, embeddings: bool | str = "auto", **fields: object) -> nn.Module:
    """A PEFT folder with scrambled values, and the model that wrote it."""
    theirs = get_peft_model(tiny(family), LoraConfig(r=4, **fields)).eval()
    _scramble_peft(theirs)
    theirs.save_pretrained(folder, save_embedding_layers=embeddings)
    return theirs


def _changed(folder: Path, **values: torch.Tensor) -> None:
    """Put tensors into a PEFT folder's file, instead of what is there under their names."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | values, folder / "adapter_model.safetensors")


COPIES = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_copies_of_the_base_are_dropped_if_they_are_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = _written_by_peft("llama", tmp_path / "a", embeddings=True, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(COPIES) <= set(tensors)
    _changed(tmp_path / "a", **{key: tensors[key].to(dtype) for key in COPIES})
    model = tiny("llama")
    lk.load(model, tmp_path / "a", "a")
    assert close(output(model), output(theirs))
    assert {placement.role for placement in attached_to(model, "a").plan} == {"attn.q"}


@pytest.mark.parametrize(("value", "words"), [(torch.zeros(64, 32), "differs"), (torch.zeros(65, 32), r"\(65, 32\)")])
def test_a_copy_of_another_base_is_a_named_fault(value: torch.Tensor, words: str, tmp_path: Path) -> None:
    _written_by_peft("llama", tmp_path / "a", embeddings=True, target_modules=["q_proj"])
    _changed(tmp_path / "a", **{COPIES[1]: value})
    with pytest.raises(BadAdapterFile, match=f"lm_head.weight is a copy of the base's weight.*{words}"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_a_bias_is_the_adapters_only_where_it_differs(tmp_path: Path) -> None:
    theirs = _written_by_peft("bert", tmp_path / "a", target_modules=["query"])
    key = "encoder.layer.0.attention.self.query"
    bias = tiny("bert").get_parameter(f"{key}.bias").detach()
    for name, value, kinds in (("equal", bias, {"low-rank"}), ("changed", bias + 1, {"low-rank", "bias"})):
        _changed(tmp_path / "a", **{f"base_model.model.{key}.base_layer.bias": value.clone()})
        model = tiny("bert")
        lk.load(model, tmp_path / "a", name)
        assert {placement.kind for placement in attached_to(model, name).plan} == kinds
        assert close(output(model), output(theirs)) == (name == "equal")


def test_alpha_0_is_0(tmp_path: Path) -> None:
    _written_by_peft("llama", tmp_path / "a", target_modules=["q_proj"], lora_alpha=0)
    model = tiny("llama")
    lk.load(model, tmp_path / "a")
    assert torch.equal(output(model), output(tiny("llama")))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"lora_alpha": "x"}, "bad lora_alpha: 'x'"),
        ({"lora_alpha": float("nan")}, "bad lora_alpha: nan"),
        ({"rank_pattern": [1]}, "bad rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "pattern '\\(' cannot be read"),
        ({"bias": 3}, "bad bias: 3"),
        ({"lora_dropout": 2.0}, "dropout"),
        ({"modules_to_save": "head"}, "bad modules_to_save"),
        ({"peft_type": "NOTHING"}, "no method for PEFT's type 'NOTHING'"),
        ({"peft_type": None}, "no method for PEFT's type .* PREFIX_TUNING, PROMPT_TUNING"),
    ],
)
def test_a_config_that_makes_no_sense_is_a_fault(entry: dict, words: str, tmp_path: Path) -> None:
    _written_by_peft("llama", tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(BadAdapterFile, match=words):
        lk.load(tiny("llama"), tmp_path / "a")


def test_tensors_without_rows_are_a_fault(tmp_path: Path) -> None:
    _written_by_peft("llama", tmp_path / "a", target_modules=["q_proj"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for value in (torch.tensor(1.0), torch.zeros(10**9, 0), torch.zeros(0, 32)):
        _changed(tmp_path / "a", **{key: value})
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        config["rank_pattern"] = {"layers.0.self_attn.q_proj": len(value) if value.dim() else 0}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(BadAdapterFile):
            lk.load(tiny("llama"), tmp_path / "a")
