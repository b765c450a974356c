"""Odd and hostile files: each is a sentence with exit code 2, or is read right; nothing is half-written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.cli import main
from lorakit.core.exchange import Exchange, Update
from lorakit.core.patterns import residual
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, LorakitError
from lorakit.interop import Told, convert, merge_checkpoint, merge_gguf, read, write
from lorakit.interop._folding import error
from lorakit.interop.check import check
from tests.laws.cases import close, output
from tests.methods.oracle import read_by_peft, written_by_peft
from tests.models import tiny_gguf
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TENSORS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
LAYER = "base_model.model.layers.0.q_proj"
PLAIN = {f"{LAYER}.lora_A.weight": torch.ones(2, 4), f"{LAYER}.lora_B.weight": torch.ones(6, 2)}
EXPERTS = {"x.experts.lora_A.weight": torch.ones(4, 4), "x.experts.lora_B.weight": torch.ones(6, 4)}
STACKED = {"target_parameters": ["experts.w"]}
ADAPTIVE = {
    f"{LAYER}.lora_{name}": torch.ones(*shape) for name, shape in {"A": (2, 4), "B": (6, 2), "E": (2, 1)}.items()
}


def folder(path: Path, tensors: dict[str, Tensor], *, pickle: bool = False, **fields: Any) -> Path:
    """A PEFT folder by hand."""
    path.mkdir()
    if pickle:
        torch.save(tensors, path / PICKLE)
    else:
        save_file(tensors, path / TENSORS, {"format": "pt"})
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | fields
    (path / CONFIG).write_text(json.dumps(told))
    return path


def shaped(a: tuple[int, ...], b: tuple[int, ...], **more: Tensor) -> dict[str, Tensor]:
    """One layer's tensors of these shapes."""
    return {f"{LAYER}.lora_A.weight": torch.ones(a), f"{LAYER}.lora_B.weight": torch.ones(b)} | {
        f"{LAYER}.{name}": value for name, value in more.items()
    }


@pytest.mark.parametrize(
    ("tensors", "fields", "words"),
    [
        (shaped((0, 4), (6, 0)), {"r": 0}, "one of them without numbers"),
        (shaped((2, 0), (6, 2)), {}, "one of them without numbers"),
        (shaped((2, 4, 3, 3), (6, 2)), {}, "do not fit each other"),
        (shaped((), ()), {}, "do not fit each other"),
        (shaped((2, 4), (6, 2), lora_magnitude_vector=torch.ones(5)), {}, "a magnitude .5,. for 6 outputs"),
        ({key: value.long() for key, value in PLAIN.items()}, {}, "no real numbers"),
        (ADAPTIVE | {f"{LAYER}.lora_E": torch.ones(3, 1)}, {"peft_type": "ADALORA"}, "for 2 ranks"),
        (EXPERTS, STACKED | {"r": -2}, "for experts of rank -2"),
        (EXPERTS, STACKED | {"rank_pattern": {"experts.w": "2"}}, "for experts of rank 2"),
        (EXPERTS | {"x.experts.lora_A.weight": torch.ones(4, 4, 1)}, STACKED, "do not fit each other"),
        (PLAIN, {"target_modules": [1]}, "bad target_modules"),
        (PLAIN, {"target_modules": "(("}, "pattern '..' cannot be read"),
        (PLAIN, {"use_dora": "no"}, "bad use_dora"),
        (PLAIN | {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4)}, {}, "of another format than the rest"),
    ],
)  # fmt: skip
def test_no_folder_like_this_is_read(
    tensors: dict[str, Tensor], fields: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "a", tensors, **fields)
    with pytest.raises(BadAdapterFile, match=words):
        read(path)
    for verb in (["inspect"], ["check", "--for", "peft"], ["convert", "-o", str(tmp_path / "out")]):
        assert main([verb[0], str(path), *verb[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("to", ["peft", "portable"])
def test_dtypes_that_no_file_takes_are_refused(dtype: torch.dtype, to: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", {key: value.to(dtype) for key, value in PLAIN.items()}, pickle=True)
    with pytest.raises(BadAdapterFile, match="no real numbers"):
        convert(path, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_convolution_over_three_dimensions_is_none_of_loralibs(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", shaped((2, 4, 3, 3, 3), (6, 2, 1, 1, 1)))
    with pytest.raises(BadAdapterFile, match="kernel 3 x 3 x 3"):
        convert(path, tmp_path / "out.pt", "loralib")


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_"])
def test_names_of_thousands_of_pieces_are_not_clear(prefix: str, tmp_path: Path) -> None:
    name = prefix + "_".join(["0"] * 5000)
    save_file({f"{name}.lora_down.weight": torch.ones(2, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(BadAdapterFile, match="which of its underscores"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["lora_unet_conv_in.lora_down.weight", "unet.conv_in.lora_A.weight"])
def test_a_number_is_no_matrix(name: str, tmp_path: Path) -> None:
    other = name.replace("down", "up").replace("lora_A", "lora_B")
    save_file({name: torch.tensor(1.0), other: torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(BadAdapterFile, match="do not fit each other"):
        read(tmp_path / "a.safetensors")


def test_a_path_that_is_too_long_is_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "x" * 5000]) == main(["check", "x" * 5000, "--for", "vllm"]) == 2
    assert capsys.readouterr().err.count("there is no such file or folder") == 2


def test_adapters_within_a_folder_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "mine", PLAIN)
    with pytest.raises(BadAdapterFile, match=r"none of the formats known: .*; adapters lie in it: mine"):
        read(tmp_path)


@pytest.mark.parametrize("start", ["OLoRA", "PiSSA", "olora"])
def test_residual_starts_are_known_however_they_are_written(start: str) -> None:
    assert residual({"init_lora_weights": start}) and not residual({"init_lora_weights": "gaussian"})


MORE = {"alora_invocation_tokens": [1], "layer_replication": [[0, 1], [0, 1]], "use_qalora": True}


@pytest.mark.parametrize("key", MORE)
@pytest.mark.parametrize("to", ["portable", "loralib", "kohya", "diffusers", "gguf"])
def test_what_is_more_than_scale_times_b_a_stays_in_pefts_folders(key: str, to: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", PLAIN, **{key: MORE[key]})
    with pytest.raises(BadAdapterFile, match=key):
        convert(path, tmp_path / "out", to, Told(base="base"))
    assert convert(path, tmp_path / "out", "peft") == []
    assert json.loads((tmp_path / "out" / CONFIG).read_text())[key] == MORE[key]


@pytest.mark.parametrize(("key", "told"), [("init_lora_weights", "pissa"), *MORE.items()])
def test_no_model_in_gguf_is_merged_with_such(key: str, told: Any, tmp_path: Path) -> None:
    tiny_gguf.of_model(tiny("llama"), tmp_path / "base.gguf")
    path = "model.layers.0.self_attn.q_proj"
    update = Update(path, value_of(torch.ones(2, 32)), value_of(torch.ones(32, 2)), 2.0)
    with pytest.raises(BadAdapterFile, match="began as pissa" if told == "pissa" else key):
        merge_gguf(tmp_path / "base.gguf", Exchange("peft", (update,), config={key: told}), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_kasas_diagonals_keep_their_names(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], kasa_config=KasaConfig())
    written_by_peft("llama", config, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "peft")
    before, after = (load_file(tmp_path / name / TENSORS) for name in "ab")
    assert any(key.endswith("lora_diag") for key in before) and before.keys() == after.keys()


def test_trained_tokens_are_nothing_that_peft_writes_into_the_base(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    written_by_peft("llama", config, tmp_path / "a")
    model = tiny("llama")
    before = output(model)
    with PeftModel.from_pretrained(model, tmp_path / "a").disable_adapter():
        assert torch.equal(output(model), before)
    assert check(read(tmp_path / "a"), tmp_path / "a", "peft") == []


@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"trainable_token_indices": [1]}])
def test_no_merge_is_offered_that_would_be_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    written_by_peft("llama", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **fields), tmp_path / "a")
    tiny("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(BadAdapterFile, match=next(iter(fields)).replace("lora_bias", "a bias on lora_B")):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    found = check(read(tmp_path / "a"), tmp_path / "a", "vllm")
    assert [each.grade for each in found] == ["refuses"] * len(found) and not any(each.mend for each in found)


class Parts(nn.Module):
    """Attention whose q, k and v are one parameter, and two heads whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.head, self.other_head = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Nothing."""
        return x


def test_modules_whose_names_only_end_so_are_peft_s_to_save_too(tmp_path: Path) -> None:
    theirs = get_peft_model(Parts(), LoraConfig(r=2, target_modules=["linear"], modules_to_save=["head"]))
    nn.init.ones_(theirs.base_model.model.other_head.modules_to_save.default.weight)
    theirs.save_pretrained(tmp_path / "a")
    found = PeftModel.from_pretrained(Parts(), tmp_path / "a").base_model.model.other_head
    assert torch.equal(found.original_module.weight, Parts().other_head.weight)  # not written into the base
    assert torch.equal(found.modules_to_save.default.weight, torch.ones(2, 8))
    assert check(read(tmp_path / "a"), tmp_path / "a", "peft") == []


def test_attention_in_one_module_comes_back_as_peft_names_it(tmp_path: Path) -> None:
    theirs = get_peft_model(Parts(), LoraConfig(r=2, lora_alpha=5, target_modules=["attention"]))
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "a")
    assert check(read(tmp_path / "a"), tmp_path / "a", "peft") == []
    wanted = theirs.double().merge_and_unload().state_dict()
    for to in ("peft", "portable"):
        convert(tmp_path / "a", tmp_path / to, to)
        assert json.loads((tmp_path / to / CONFIG).read_text())["target_modules"] == ["attention"]
        found = PeftModel.from_pretrained(Parts(), tmp_path / to).double().merge_and_unload().state_dict()
        assert all(torch.allclose(found[key], value, rtol=0, atol=1e-6) for key, value in wanted.items())


def test_a_layer_of_which_adalora_left_nothing_comes_back(tmp_path: Path) -> None:
    none = {"x.lora_A": torch.ones(0, 4), "x.lora_B": torch.ones(6, 0), "x.lora_E": torch.ones(0, 1)}
    path = folder(tmp_path / "a", ADAPTIVE | {f"base_model.model.{k}": v for k, v in none.items()}, peft_type="ADALORA")
    assert main(["inspect", str(path)]) == 0
    convert(path, tmp_path / "b", "peft")
    before, after = (load_file(tmp_path / name / TENSORS) for name in "ab")
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


@pytest.mark.parametrize(("alpha", "scale"), [(0, 12), (6, 6), (None, 8)])
def test_adaloras_scale_is_pefts(alpha: float | None, scale: float, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", ADAPTIVE, peft_type="ADALORA", init_r=12, lora_alpha=alpha)
    assert math.isclose(read(path).updates[0].scale, scale / (12 + 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_what_halving_would_round_in_few_exponents_is_folded_in_float32(dtype: torch.dtype) -> None:
    b = torch.tensor([[6e-8, 3e-3], [2e-3, 1.0]]).to(dtype)
    update = Update("q", value_of(torch.ones(2, 2)), value_of(b), alpha=1.0)
    for alpha in (update.alpha, 2.0):
        changed = replace(update, alpha=alpha)
        assert error(changed, changed.scale) == 0.0


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [1]}, {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}]
)
def test_a_portable_folder_means_no_layers_but_its_own(fields: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], **fields)
    theirs = output(written_by_peft("llama", config, tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "b", "portable")
    found = read_by_peft("llama", tmp_path / "b")
    assert sum(".lora_A." in name for name, _ in found.named_parameters()) == 1
    assert close(output(found), theirs, 1e-5)


@pytest.mark.parametrize("rank", [-3, 0, 10**9])
def test_a_rank_that_no_matrix_has_is_no_ones_to_ask_for(rank: int, tmp_path: Path) -> None:
    with pytest.raises(BadAdapterFile, match=f"rank {rank} asked for|above the {rank}"):
        convert(folder(tmp_path / "a", PLAIN), tmp_path / "out", "portable", Told(rank=rank))
    assert not (tmp_path / "out").exists()


def test_loralibs_alpha_is_told_in_full(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", PLAIN, use_rslora=True, lora_alpha=16)
    (note,) = convert(path, tmp_path / "a.pt", "loralib")
    assert float(note.rpartition("=")[2]) == read(path).updates[0].scale * 2


def test_enabled_takes_true_and_false_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.ones(6, 2)}, tmp_path / "a.pt")
    words = ["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "out"), "--alpha", "4", "--enabled", "yes,no"]
    assert main(words) == 2
    assert "--enabled takes True or False for each part, not yes,no" in capsys.readouterr().err


def test_a_base_with_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    update = Update(path, value_of(torch.ones(2, 32)), value_of(torch.ones(32, 2)), 2.0)
    with pytest.raises(LorakitError, match="cannot be read"):
        write(Exchange("peft", (update,)), tmp_path / "a.gguf", "gguf", Told(base="x" * 5000))


@pytest.mark.parametrize("blocks", [2**31, 2**32 - 1])
def test_no_table_is_made_of_a_claim_in_a_header(blocks: int, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, told in {"general.type": "adapter", "adapter.type": "lora"}.items():
        writer.add_string(key, told)
    writer.add_float32("adapter.lora.alpha", 2.0)
    writer.add_uint32("llama.block_count", blocks)
    for name, shape in {"a": (2, 32), "b": (32, 2)}.items():
        writer.add_tensor(f"blk.0.attn_v.weight.lora_{name}", torch.ones(shape).numpy())
    tiny_gguf._finish(writer, tmp_path / "a.gguf")
    with pytest.raises(LorakitError, match=f"says that it has {blocks} blocks"):
        read(tmp_path / "a.gguf")
