"""Adapters of diffusers' image pipelines: one file, whose names begin with the part of the pipeline.

`unet.mid_block.attentions.0.proj_in.lora_A.weight` is A, `.lora_B.weight` B. Older files say `.lora.down.weight`,
`.lora_linear_layer.down.weight` (text encoders) or `.processor.to_q_lora.down.weight` (attention processors). alpha is
the rank, unless the file has a number a layer (`.alpha`), or PEFT's config of each part in its header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.core.atomic import new_folder
from lorakit.core.checked import misfits
from lorakit.core.exchange import Exchange, Update
from lorakit.core.patterns import alpha_of, fields_of, pattern_faults
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile
from lorakit.interop.format import Told
from lorakit.interop.formats import _one_file as file
from lorakit.interop.shards import write_values

TITLE = "diffusers file"
HEADER = "lora_adapter_metadata"
NAME = "pytorch_lora_weights"
_PARTS = re.compile(r"(unet|transformer(_2|_ref)?|text_encoder(_[23])?|text_conditioner|connectors|prior)\.")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")  # oldest files leave its name out
_WRITTEN = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "shift": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}
_ENDS = {end: kind for kind, end in _WRITTEN.items()} | {
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".lora_linear_layer.down.weight": "a",
    ".lora_linear_layer.up.weight": "b",
    "_lora.down.weight": "a",
    "_lora.up.weight": "b",
    ".alpha": "alpha",
}
_PROCESSORS = {  # what attention processors call the layers -> what they are called in a UNet, and in a text encoder
    "to_q": ("to_q", "q_proj"),
    "to_k": ("to_k", "k_proj"),
    "to_v": ("to_v", "v_proj"),
    "to_out": ("to_out.0", "out_proj"),
}
Layers = Mapping[tuple[str, str], Mapping[str, Value]]  # by part and path
_CONFIG = {
    "r": int | None,
    "lora_alpha": float | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
}


def recognises(path: Path) -> bool:
    """Whether a file, or the one that diffusers looks for in a folder, has tensors of B A in parts of a pipeline."""
    ends = tuple(end for end, kind in _ENDS.items() if kind == "a")
    return any(key.endswith(ends) and _place(key) for key in file.names_in(_file(path)))


def _file(path: Path) -> Path:
    found = [path / f"{NAME}{suffix}" for suffix in (file.SAFETENSORS, ".bin")]
    return next((each for each in found if each.is_file()), path)


def _place(key: str) -> tuple[str, str, str] | None:
    """The part, the path in it and what the tensor is; None for a name that no such file has.

    >>> _place("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight")
    ('text_encoder', 'text_model.encoder.layers.0.self_attn.out_proj', 'b')
    """
    key = f"unet.{key}" if _UNET.match(key) else key
    end = next((end for end in _ENDS if key.endswith(end)), None)
    if end is None or not _PARTS.match(key):
        return None
    part, _, path = key.removesuffix(end).replace(".processor.", ".").partition(".")
    layer = path.rpartition(".")[2]
    if end.startswith("_"):
        path = path.removesuffix(layer) + _PROCESSORS.get(layer, (layer, layer))[part.startswith("text_encoder")]
    return (part, path, _ENDS[end]) if path else None


def read(path: Path, told: Told) -> Exchange:
    """What the file holds; a path is that of the layer in its part, after the part's name.

    Raises:
        BadAdapterFile: every name that no such file has, shapes that do not fit, a header that makes no sense, alphas
            both there and beside the layers, or beside some layers only.
    """
    values, metadata = file.tensors_in(_file(path))
    layers: dict[tuple[str, str], dict[str, Value]] = {}
    faults = []
    for key, value in values.items():
        place = _place(key)
        if place is None:
            faults.append(f"{key} is nothing that a low-rank update B A in a part of a pipeline has a place for")
        elif place[2] in layers.setdefault(place[:2], {}):
            faults.append(f"{key} stands there under two names")
        else:
            layers[place[:2]][place[2]] = value
    configs, more = _configs(metadata, layers)
    faults += more
    if faults:
        raise BadAdapterFile(path, faults)
    updates = [_update(place, layer, configs.get(place[0], {}), told, faults) for place, layer in layers.items()]
    if faults:
        raise BadAdapterFile(path, faults)
    found = tuple(update for update in updates if update is not None)
    return Exchange("diffusers", found, base=told.base or metadata.get("ss_sd_model_name"), config=metadata)


def _configs(metadata: Mapping[str, str], layers: Layers) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """PEFT's config of each part, where the header has them, and what is wrong with what the file says of alphas."""
    with_alpha = [".".join(place) for place, layer in layers.items() if "alpha" in layer]
    bare = [".".join(place) for place, layer in layers.items() if "alpha" not in layer]
    faults = [f"{with_alpha[0]} has an alpha, but {bare[0]} has none"] if with_alpha and bare else []
    if HEADER not in metadata:
        return {}, faults
    faults += [f"{with_alpha[0]} has an alpha beside those of the header's {HEADER}"] if with_alpha else []
    try:
        told = json.loads(metadata[HEADER])
    except (ValueError, RecursionError) as error:
        return {}, [*faults, f"its {HEADER} is damaged ({error})"]
    if not isinstance(told, dict):
        return {}, [*faults, f"its {HEADER} is not a JSON object"]
    configs: dict[str, dict[str, Any]] = {}
    for key, value in told.items():
        part, _, field = key.partition(".")
        configs.setdefault(part, {})[field] = value
    for part, config in configs.items():
        faults += misfits(config, _CONFIG, f"its header for {part}") or pattern_faults(config)
    return configs, faults


def _update(
    place: tuple[str, str], layer: Mapping[str, Value], config: Mapping[str, Any], told: Told, faults: list[str]
) -> Update | None:
    rank = file.rank_in(layer)
    if config:
        alpha = alpha_of(config, place[1], rank, faults)
    elif "alpha" in layer:
        alpha = file.number(layer["alpha"])
    else:
        alpha = float(rank) if told.alpha is None else told.alpha
    update = file.update_of(".".join(place), layer, alpha, faults)
    return update and replace(update, rooted=bool(config.get("use_rslora")))


def write(exchange: Exchange, out: Path, told: Told) -> list[str]:
    """The same tensors under today's names; PEFT's config of each part, which has the scales, is in the header.

    Raises:
        BadAdapterFile: something else than low-rank updates of linear layers and convolutions, a layer of no part of a
            pipeline, a part of which some layers only have DoRA's magnitude or a bias of B, a value that is not finite.
        OutputExists, LorakitError: `out` (a file whose name ends in .safetensors, or a folder) cannot be written.
    """
    parts = _parts(exchange)
    faults = [*file.unsaid(exchange, TITLE, ("linear", "convolution"), ("magnitude", "shift")), *_faults(parts)]
    if faults:
        raise BadAdapterFile("the adapter", faults)
    values = {
        f"{update.path}{end}": value
        for update in exchange.updates
        for kind, end in _WRITTEN.items()
        if (value := getattr(update, kind)) is not None
    }
    told_of = {f"{part}.{key}": value for part, own in parts.items() for key, value in _config(own).items()}
    header = file.texts(exchange, "diffusers") | {HEADER: json.dumps(told_of, indent=2, sort_keys=True)}
    if out.suffix == file.SAFETENSORS:
        file.write_safetensors(out, values, header)
    else:
        with new_folder(out) as folder:
            write_values(folder / f"{NAME}{file.SAFETENSORS}", values, header)
    scaled = any(update.scale != 1 for update in exchange.updates)
    return [f"its scales stand in the header alone ({HEADER}), which diffusers reads from 0.34 on"] if scaled else []


def _parts(exchange: Exchange) -> dict[str, dict[str, Update]]:
    """The updates by part, and by their paths in it."""
    parts: dict[str, dict[str, Update]] = {}
    for update in exchange.updates:
        part, _, path = update.path.partition(".")
        parts.setdefault(part, {})[path] = update
    return parts


def _faults(parts: Mapping[str, Mapping[str, Update]]) -> Iterator[str]:
    for part, updates in parts.items():
        if not _PARTS.fullmatch(f"{part}."):
            yield f"{part}.{next(iter(updates))} lies in no part of a pipeline (unet, transformer, text_encoder …)"
        for field in ("magnitude", "shift"):
            have = [path for path, update in updates.items() if getattr(update, field) is not None]
            if have and len(have) < len(updates):
                yield f"{part}.{have[0]} has a {field}, other layers of {part} have not; diffusers wants it of all"


def _config(updates: Mapping[str, Update]) -> dict[str, Any]:
    """PEFT's config of a part."""
    return fields_of(
        {path: update.rank for path, update in updates.items()},
        {path: file.plain_alpha(update) for path, update in updates.items()},
    ) | {
        "target_modules": sorted(updates),
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "lora_bias": any(update.shift is not None for update in updates.values()),
    }
