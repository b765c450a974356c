"""diffusers' names, old and new; PEFT, by which diffusers loads, is the oracle for what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.core.exchange import Exchange, Update
from lorakit.core.values import value_of
from lorakit.errors import BadAdapterFile, OutputExists
from lorakit.interop.format import Told
from lorakit.interop.formats import diffusers
from lorakit.interop.reading import format_of

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn"
KEYS = {  # old and new, of A -> the path
    f"{LAYER}.lora_A.weight": LAYER,
    f"{LAYER}.lora.down.weight": LAYER,
    "unet.mid_block.attn1.processor.to_q_lora.down.weight": "unet.mid_block.attn1.to_q",
    "unet.mid_block.attn1.processor.to_out_lora.down.weight": "unet.mid_block.attn1.to_out.0",
    "mid_block.attn1.processor.to_v_lora.down.weight": "unet.mid_block.attn1.to_v",
    "unet.mid_block.attn1.to_out.0.lora.down.weight": "unet.mid_block.attn1.to_out.0",
    f"{ENCODER}.q_proj.lora_linear_layer.down.weight": f"{ENCODER}.q_proj",
    f"{ENCODER}.to_q_lora.down.weight": f"{ENCODER}.q_proj",
    f"{ENCODER}.to_out_lora.down.weight": f"{ENCODER}.out_proj",
    "text_encoder_2.text_projection.lora_A.weight": "text_encoder_2.text_projection",
    "transformer.single_blocks.3.proj_out.lora_A.weight": "transformer.single_blocks.3.proj_out",
}


def tensors(*keys: str, rank: int = 2) -> dict[str, Tensor]:
    """A and B by the name of A."""
    torch.manual_seed(0)
    found = {}
    for key in keys:
        found[key] = torch.randn(rank, 6).half()
        found[key.replace("down", "up").replace("lora_A", "lora_B")] = torch.randn(8, rank).half()
    return found


def saved(path: Path, content: dict[str, Tensor], header: object = None) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(content, path, metadata={} if header is None else {"lora_adapter_metadata": text})
    return path


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora_adapter_metadata"])
        return found


@pytest.mark.parametrize("key", KEYS)
def test_every_way_of_naming_is_read(tmp_path: Path, key: str) -> None:
    content = tensors(key)
    path = saved(tmp_path / "a.safetensors", content)
    assert format_of(path) is diffusers
    (update,) = diffusers.read(path, Told()).updates
    assert (update.path, update.scale) == (KEYS[key], 1.0)
    assert torch.equal(update.a.read(), content[key]) and update.b.shape == (8, 2)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_folder_is_read_by_the_name_that_diffusers_gives_its_file(tmp_path: Path, save: Callable[..., None]) -> None:
    save(
        tensors(f"{LAYER}.lora_A.weight"),
        tmp_path / f"pytorch_lora_weights{'.bin' if save is torch.save else '.safetensors'}",
    )
    assert format_of(tmp_path) is diffusers
    assert diffusers.read(tmp_path, Told()).updates[0].path == LAYER


def test_today_s_names_and_header_come_back_to_the_bit(tmp_path: Path) -> None:
    content = tensors(*(key for key in KEYS if "lora_A" in key))
    content |= {f"{LAYER}.lora_B.bias": torch.randn(8).half(), f"{LAYER}.lora_magnitude_vector": torch.rand(8).half()}
    path = saved(tmp_path / "a.safetensors", content, {"unet.lora_alpha": 6, "unet.r": 2})
    exchange = diffusers.read(path, Told())
    assert {update.path: update.alpha for update in exchange.updates}[LAYER] == 6
    diffusers.write(exchange, tmp_path / "b.safetensors", Told())
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == content.keys() and all(torch.equal(again[name], each) for name, each in content.items())
    diffusers.write(diffusers.read(tmp_path / "b.safetensors", Told()), tmp_path / "c.safetensors", Told())
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_number_a_layer_is_its_alpha(tmp_path: Path) -> None:
    other = LAYER.replace("to_q", "to_k")
    content = tensors(f"{LAYER}.lora_A.weight", f"{other}.lora_A.weight")
    content |= {f"{LAYER}.alpha": torch.tensor(4.0), f"{other}.alpha": torch.tensor(1.0)}
    found = diffusers.read(saved(tmp_path / "a.safetensors", content), Told())
    assert {update.path: update.scale for update in found.updates} == {LAYER: 2.0, other: 0.5}


def test_without_any_alpha_a_told_one_counts(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", tensors(f"{LAYER}.lora_A.weight"))
    assert diffusers.read(path, Told(alpha=8.0)).updates[0].scale == 4.0


def test_the_header_is_pefts_config_of_each_part(tmp_path: Path) -> None:
    keys = [
        f"{part}.{layer}.lora_A.weight" for part in ("unet", "text_encoder") for layer in ("a.proj_out", "proj_out")
    ]
    told = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"^proj_out": 3}, "unet.r": 2, "unet.use_rslora": True}
    path = saved(tmp_path / "a.safetensors", tensors(*keys), told | {"text_encoder.lora_alpha": 1, "text_encoder.r": 2})
    found = {update.path: update.scale for update in diffusers.read(path, Told()).updates}
    root = 2**0.5
    assert found == {
        "unet.a.proj_out": 6 / root,
        "unet.proj_out": 3 / root,
        "text_encoder.a.proj_out": 0.5,
        "text_encoder.proj_out": 0.5,
    }


class Block(nn.Module):
    """A part of a pipeline in which a path ends as another whole path does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(6, 6))
        self.inner.add_module("proj_out", nn.Linear(6, 6))
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.proj_out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.proj_out(self.conv(self.inner(x)[None, None])[0, 0])
        return found


def _updates(*, magnitude: bool, shift: bool) -> tuple[Update, ...]:
    torch.manual_seed(2)
    found = []
    for number, path in enumerate(("inner.0", "inner.proj_out", "conv", "proj_out")):
        rank, kernel = max(number, 1), ((3, 3) if path == "conv" else ())
        width = 1 if kernel else 6
        found.append(
            Update(
                f"unet.{path}",
                value_of(torch.randn(rank, width, *kernel)),
                value_of(torch.randn(width, rank, *[1] * len(kernel))),
                alpha=3.0 - rank / 2,
                rooted=path == "conv",
                form="convolution" if kernel else "linear",
                magnitude=value_of(torch.rand((1, 1, 1, 1) if kernel else (6,)) + 0.5) if magnitude else None,
                shift=value_of(torch.randn(width)) if shift else None,
            )
        )
    return tuple(found)


@pytest.mark.parametrize("kind", ["plain", "magnitude", "shift"])
def test_peft_makes_of_the_header_and_names_what_was_meant(tmp_path: Path, kind: str) -> None:
    updates = _updates(magnitude=kind == "magnitude", shift=kind == "shift")
    diffusers.write(Exchange("peft", updates), tmp_path / "a.safetensors", Told())
    x = torch.randn(5, 6)
    model, content = Block(), load_file(tmp_path / "a.safetensors")
    bare = {name.removeprefix("unet."): each for name, each in content.items()}
    config = {key.removeprefix("unet."): value for key, value in header_of(tmp_path / "a.safetensors").items()}
    peft.inject_adapter_in_model(peft.LoraConfig(**config), model, state_dict=bare)
    answer = peft.set_peft_model_state_dict(model, bare)
    assert not answer.unexpected_keys
    wanted = _merged(Block().double(), updates)(x.double())
    torch.testing.assert_close(model.eval()(x).double(), wanted, rtol=1e-4, atol=1e-4)


def _merged(model: nn.Module, updates: tuple[Update, ...]) -> nn.Module:
    """The model with every update in its weights, by float64 algebra."""
    for update in updates:
        layer: Any = model.get_submodule(update.path.removeprefix("unet."))
        flat = update.b.read().double().flatten(1) @ update.a.read().double().flatten(1)
        weight = layer.weight.data + update.scale * flat.view(layer.weight.shape)
        if update.magnitude is not None:
            rows = weight.flatten(1)
            weight = (rows / rows.norm(dim=1, keepdim=True) * update.magnitude.read().double().view(-1, 1)).view_as(
                weight
            )
        layer.weight.data = weight
        if update.shift is not None:
            layer.bias.data += update.scale * update.shift.read().double()
    return model


def test_scales_that_stand_in_the_header_alone_are_told(tmp_path: Path) -> None:
    plain = tuple(
        replace(update, alpha=float(update.rank), rooted=False) for update in _updates(magnitude=False, shift=False)
    )
    assert diffusers.write(Exchange("peft", plain), tmp_path / "a.safetensors", Told()) == []
    (note,) = diffusers.write(Exchange("peft", _updates(magnitude=False, shift=False)), tmp_path / "b", Told())
    assert "in the header alone" in note
    assert [each.name for each in (tmp_path / "b").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        diffusers.write(Exchange("peft", _updates(magnitude=False, shift=False)), tmp_path / "a.safetensors", Told())
    assert (tmp_path / "a.safetensors").read_bytes() == b"mine"


NEW = f"{LAYER}.lora_A.weight"


@pytest.mark.parametrize(
    ("content", "header", "reason"),
    [
        (tensors(NEW) | {"unet.x.weight": torch.ones(2)}, None, r"unet\.x\.weight is nothing that"),
        (tensors(NEW) | {"vae.x.lora_A.weight": torch.ones(2, 2)}, None, r"vae\.x\.lora_A\.weight is nothing that"),
        (tensors("unet.lora_A.weight"), None, r"unet\.lora_A\.weight is nothing that"),
        (tensors(NEW, f"{LAYER}.lora.down.weight"), None, "stands there under two names"),
        ({NEW: torch.ones(2, 6)}, None, "lacks its B"),
        (tensors(NEW, "unet.k.lora_A.weight") | {f"{LAYER}.alpha": torch.tensor(1.0)}, None, r"but unet\.k has none"),
        (tensors(NEW) | {f"{LAYER}.alpha": torch.tensor(1.0)}, {"unet.r": 2}, "beside those of the header"),
        (tensors(NEW) | {f"{LAYER}.alpha": torch.ones(3)}, None, "alpha that is no finite number"),
        (tensors(NEW) | {f"{LAYER}.lora_magnitude_vector": torch.ones(3)}, None, r"magnitude \(3,\) for 8 outputs"),
        (tensors(NEW), "{", "lora_adapter_metadata is damaged"),
        (tensors(NEW), [1], "is not a JSON object"),
        (tensors(NEW), {"unet.lora_alpha": "x"}, "its header for unet has a bad lora_alpha"),
        (tensors(NEW), {"unet.alpha_pattern": {"(": 3}}, r"its pattern '\(' cannot be read"),
        (tensors(NEW), {"unet.r": 3}, "has rank 2, but the config says 3"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    tmp_path: Path, content: dict[str, Tensor], header: object, reason: str
) -> None:
    with pytest.raises(BadAdapterFile, match=reason):
        diffusers.read(saved(tmp_path / "a.safetensors", content, header), Told())


def _update(**changes: Any) -> Update:
    return replace(Update("unet.a", value_of(torch.randn(2, 3)), value_of(torch.randn(4, 2)), 2.0), **changes)


@pytest.mark.parametrize(
    ("exchange", "reason"),
    [
        (Exchange("peft", (_update(path="model.layers.0.q_proj"),)), "lies in no part of a pipeline"),
        (
            Exchange("peft", (_update(magnitude=value_of(torch.ones(4))), _update(path="unet.b"))),
            "unet.a has a magnitude",
        ),
        (Exchange("peft", (_update(diagonal=value_of(torch.ones(2, 1))),)), "a diagonal"),
        (Exchange("peft", (_update(form="embedding"),)), "adapts embedding"),
        (Exchange("peft", (_update(),), whole={"unet.x.bias": value_of(torch.ones(1))}), r"unet\.x\.bias stands in"),
        (Exchange("peft", (_update(b=value_of(torch.full((4, 2), torch.nan))),)), "not finite"),
    ],
)
@pytest.mark.parametrize("out", ["a.safetensors", "a"])
def test_what_diffusers_cannot_express_is_refused(tmp_path: Path, exchange: Exchange, reason: str, out: str) -> None:
    with pytest.raises(BadAdapterFile, match=reason):
        diffusers.write(exchange, tmp_path / out, Told())
    assert list(tmp_path.iterdir()) == []
