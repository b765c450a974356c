"""kohya's names and tensors, and the way to diffusers' and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.core.exchange import Exchange, Update
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, LorakitError
from lorakit.interop.format import Told
from lorakit.interop.formats import diffusers, kohya
from lorakit.interop.reading import format_of

ATTENTION = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
NAMES = {  # of Stable Diffusion 1.5 and XL, and of their text encoders
    ATTENTION: "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_9_attn2_to_k": (
        "unet.up_blocks.1.attentions.2.transformer_blocks.9.attn2.to_k"
    ),
    "lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_ff_net_0_proj": (
        "unet.down_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    ),
    "lora_unet_up_blocks_0_resnets_2_conv_shortcut": "unet.up_blocks.0.resnets.2.conv_shortcut",
    "lora_unet_down_blocks_0_resnets_0_time_emb_proj": "unet.down_blocks.0.resnets.0.time_emb_proj",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_conv_in": "unet.conv_in",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    "lora_unet_add_embedding_linear_2": "unet.add_embedding.linear_2",
    "lora_te1_text_model_encoder_layers_11_self_attn_out_proj": (
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj"
    ),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    "lora_te2_text_projection": "text_encoder_2.text_projection",
}


def tensors(
    *names: str, dtype: torch.dtype = torch.float16, alpha: Tensor | None = None, rank: int = 4
) -> dict[str, Tensor]:
    """What kohya's scripts save of layers; those with `conv` in their names are 3 x 3 convolutions."""
    torch.manual_seed(0)
    found = {}
    for name in names:
        kernel = (3, 3) if "conv" in name else ()
        found[f"{name}.lora_down.weight"] = torch.randn(rank, 6, *kernel).to(dtype)
        found[f"{name}.lora_up.weight"] = torch.randn(8, rank, *[1] * len(kernel)).to(dtype)
        found[f"{name}.alpha"] = torch.tensor(1.5, dtype=dtype) if alpha is None else alpha.clone()
    return found


def saved(path: Path, content: dict[str, Tensor], **metadata: str) -> Path:
    save_file(content, path, metadata=metadata)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def test_names_become_the_paths_of_diffusers_models(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", tensors(*NAMES))
    assert format_of(path) is kohya
    assert sorted(update.path for update in kohya.read(path, Told()).updates) == sorted(NAMES.values())


def test_a_layers_change_is_kohyas(tmp_path: Path) -> None:
    content = tensors(ATTENTION, "lora_unet_conv_in", dtype=torch.float32)
    for update in kohya.read(saved(tmp_path / "a.safetensors", content), Told()).updates:
        name = "lora_unet_conv_in" if update.form == "convolution" else ATTENTION
        down, up = content[f"{name}.lora_down.weight"].double(), content[f"{name}.lora_up.weight"].double()
        assert (update.form, update.scale) == ("convolution" if down.ndim == 4 else "linear", 1.5 / 4)
        assert torch.equal(update.a.read().double(), down) and torch.equal(update.b.read().double(), up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("through", [True, False])
def test_the_way_there_and_back_keeps_names_and_bits(tmp_path: Path, dtype: torch.dtype, through: bool) -> None:
    content = tensors(*NAMES, dtype=dtype)
    told = {"ss_network_dim": "4", "ss_base_model_version": "sdxl_base_v1-0", "sshs_model_hash": "abc"}
    exchange = kohya.read(saved(tmp_path / "a.safetensors", content, **told), Told())
    if through:
        diffusers.write(exchange, tmp_path / "b.safetensors", Told())
        exchange = diffusers.read(tmp_path / "b.safetensors", Told())
    assert kohya.write(exchange, tmp_path / "c.safetensors", Told()) == []
    assert same(load_file(tmp_path / "c.safetensors"), content)
    kept = header(tmp_path / "c.safetensors")
    assert kept["ss_network_dim"] == "4" and ("sshs_model_hash" in kept) is not through  # a hash of other names


def test_the_first_of_two_text_encoders_alone_keeps_its_name(tmp_path: Path) -> None:
    content = tensors("lora_te1_text_projection")
    path = saved(tmp_path / "a.safetensors", content, ss_base_model_version="sdxl_base_v1-0")
    diffusers.write(kohya.read(path, Told()), tmp_path / "b.safetensors", Told())
    kohya.write(diffusers.read(tmp_path / "b.safetensors", Told()), tmp_path / "c.safetensors", Told())
    assert same(load_file(tmp_path / "c.safetensors"), content)


@pytest.mark.parametrize("alpha", [torch.tensor(8), torch.tensor(8.0, dtype=torch.float32), None])
@pytest.mark.parametrize("through", [True, False])
def test_alphas_of_another_dtype_or_none_at_all_come_back(tmp_path: Path, alpha: Tensor | None, through: bool) -> None:
    content = tensors(ATTENTION, "lora_te_text_model_encoder_layers_0_mlp_fc1", alpha=alpha)
    if alpha is None:
        content = {name: each for name, each in content.items() if not name.endswith("alpha")}
    exchange = kohya.read(saved(tmp_path / "a.safetensors", content), Told())
    assert {update.alpha for update in exchange.updates} == {4.0 if alpha is None else 8.0}
    if through:
        diffusers.write(exchange, tmp_path / "b.safetensors", Told())
        exchange = diffusers.read(tmp_path / "b.safetensors", Told())
    kohya.write(exchange, tmp_path / "c.safetensors", Told())
    assert same(load_file(tmp_path / "c.safetensors"), content)
    assert "ss_lorakit_alphas" not in header(tmp_path / "c.safetensors")


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (2.0, 0.5)])
def test_an_alpha_of_zero_is_the_rank(tmp_path: Path, alpha: float, scale: float) -> None:
    content = tensors(ATTENTION, alpha=torch.tensor(alpha))
    assert kohya.read(saved(tmp_path / "a.safetensors", content), Told()).updates[0].scale == scale


def test_an_alpha_that_is_told_is_for_files_without_one(tmp_path: Path) -> None:
    content = tensors(ATTENTION)
    del content[f"{ATTENTION}.alpha"]
    assert kohya.read(saved(tmp_path / "a.safetensors", content), Told(alpha=8.0)).updates[0].scale == 2.0


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (["unet.conv_in", "text_encoder.text_projection"], "lora_te_text_projection"),
        (["text_encoder_2.text_projection", "text_encoder.text_projection"], "lora_te1_text_projection"),
        (
            ["unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q", "text_encoder.text_projection"],
            "lora_te1_text_projection",
        ),
    ],
)
def test_the_only_text_encoder_has_a_name_of_its_own(tmp_path: Path, names: list[str], written: str) -> None:
    exchange = Exchange("peft", tuple(_update(path=name) for name in names))
    kohya.write(exchange, tmp_path / "a.safetensors", Told())
    assert f"{written}.alpha" in load_file(tmp_path / "a.safetensors")
    assert [update.path for update in kohya.read(tmp_path / "a.safetensors", Told()).updates]


def _update(**changes: Any) -> Update:
    plain = Update("unet.conv_in", value_of(torch.randn(2, 3)), value_of(torch.randn(4, 2)), 2.0)
    return replace(plain, **changes)


def test_a_scale_that_no_half_holds_stands_in_float32_and_is_told(tmp_path: Path) -> None:
    half = _update(a=value_of(torch.randn(2, 3).half()), alpha=16.0, rooted=True)
    (note,) = kohya.write(Exchange("peft", (half,)), tmp_path / "a.safetensors", Told())
    alpha = load_file(tmp_path / "a.safetensors")["lora_unet_conv_in.alpha"]
    assert alpha.dtype == torch.float32 and "relative error at most" in note
    assert kohya.read(tmp_path / "a.safetensors", Told()).updates[0].scale == pytest.approx(half.scale, rel=1e-7)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_doras_magnitude_over_outputs_is_pefts(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    name = "lora_unet_conv_out" if kernel else ATTENTION
    content = tensors(name) | {f"{name}.dora_scale": torch.rand(8, 1, *[1] * len(kernel))}
    exchange = kohya.read(saved(tmp_path / "a.safetensors", content), Told())
    magnitude = exchange.updates[0].magnitude
    assert magnitude is not None and magnitude.shape == ((1, 8, 1, 1) if kernel else (8,)) == tuple(
        magnitude.read().shape
    )
    kohya.write(exchange, tmp_path / "b.safetensors", Told())
    assert same(load_file(tmp_path / "b.safetensors"), content)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dora_scale": torch.ones(1, 6)}, r"magnitude \(1, 6\) for 8 outputs"),
        ({"dora_scale": torch.ones(1, 8)}, r"dora_scale \(1, 8\) over its inputs"),
        ({"hada_w1_a": torch.ones(2)}, "Hadamard products"),
        ({"lokr_w1": torch.ones(2)}, "Kronecker products"),
        ({"lora_mid.weight": torch.ones(2)}, "a core between A and B"),
        ({"diff_b": torch.ones(2)}, "whole differences"),
        ({"scalar": torch.ones(2)}, "scalar is nothing that"),
        ({"alpha": torch.tensor(torch.nan)}, "alpha that is no finite number"),
        ({"alpha": torch.ones(2)}, "alpha that is no finite number"),
        ({"lora_up.weight": torch.ones(8, 3)}, r"A \(4, 6\) and B \(8, 3\), which do not fit"),
        ({"lora_up.weight": torch.ones(8, 4, 1, 1)}, "do not fit"),
        ({"lora_up.weight": torch.ones(8, 4, dtype=torch.int32)}, "which are no real numbers"),
        ({"lora_up.weight": None}, "lacks its B"),
    ],
)
def test_other_methods_and_wrong_shapes_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    content: dict[str, Any] = tensors(ATTENTION) | {f"{ATTENTION}.{end}": each for end, each in changes.items()}
    path = saved(tmp_path / "a.safetensors", {name: each for name, each in content.items() if each is not None})
    with pytest.raises(BadAdapterFile, match=reason):
        kohya.read(path, Told())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "the model's first code"),
        ("lora_unet_double_blocks_0_img_attn_proj", "the model's first code"),
        ("lora_unet_mid_block_strange_0", "does not tell which of its underscores"),
        ("lora_unet_", "does not tell"),
        ("lora_te3_encoder_layers_0", "does not tell"),
    ],
)
def test_names_that_are_not_clear_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    path = saved(tmp_path / "a.safetensors", tensors(ATTENTION, name))
    with pytest.raises(BadAdapterFile, match=f"{name} .*{reason}"):
        kohya.read(path, Told())


def test_a_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    content = tensors("lora_te_text_projection", "lora_te1_text_projection")
    with pytest.raises(BadAdapterFile, match=r"text_encoder\.text_projection stands there under two names"):
        kohya.read(saved(tmp_path / "a.safetensors", content), Told())


@pytest.mark.parametrize(
    ("exchange", "reason"),
    [
        (Exchange("peft", (_update(path="model.layers.0.q_proj"),)), "q_proj has no kohya name"),
        (Exchange("peft", (_update(path="unet.motion_modules.0"),)), "motion_modules.0 has no kohya name"),
        (Exchange("peft", (_update(shift=value_of(torch.ones(4))),)), "a bias of B"),
        (Exchange("peft", (_update(diagonal=value_of(torch.ones(2, 1))),)), "a diagonal"),
        (Exchange("peft", (_update(form="embedding"),)), "adapts embedding"),
        (Exchange("peft", (_update(),), whole={"unet.x.bias": value_of(torch.ones(1))}), r"unet\.x\.bias stands in"),
        (Exchange("peft", (_update(b=value_of(torch.full((4, 2), torch.inf))),)), "not finite"),
        (Exchange("peft", ()), "no low-rank updates"),
    ],
)
def test_what_kohya_cannot_express_is_refused(tmp_path: Path, exchange: Exchange, reason: str) -> None:
    with pytest.raises(BadAdapterFile, match=reason):
        kohya.write(exchange, tmp_path / "a.safetensors", Told())
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"ends in \.safetensors"):
        kohya.write(Exchange("peft", (_update(),)), tmp_path / "a", Told())


@pytest.mark.parametrize("bytes_", [b"", b"\xff" * 64])
def test_a_damaged_file_is_nobodys(tmp_path: Path, bytes_: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes_)
    assert not kohya.recognises(tmp_path / "a.safetensors") and not kohya.recognises(tmp_path)
    with pytest.raises(BadAdapterFile, match="damaged"):
        kohya.read(tmp_path / "a.safetensors", Told())
