"""Files of kohya's sd-scripts for image models: safetensors whose names have underscores where the layers have dots.

`lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` is A, `.lora_up.weight` B, `.alpha` a number a layer;
without one (or at 0) alpha is the rank. `.dora_scale` (O, 1) is DoRA's magnitude as LyCORIS writes it; a (1, I) scales
inputs, which is another method. Which underscores were dots is told by the words by which diffusers' UNets and CLIP's
text encoders call their modules.

Legend: I in, O out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.core.exchange import Exchange, Update
from lorakit.core.values import Value, value_of
from lorakit.errors import BadAdapterFile
from lorakit.interop.format import Told
from lorakit.interop.formats import _one_file as file
from lorakit.interop.shards import DTYPES, NAMES

TITLE = "kohya file"
ALPHAS = "ss_lorakit_alphas"  # in a header: the dtype of the alphas, where it is not that of A; "none" without alphas
_PARTS = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_ENDS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha", "dora_scale": "magnitude"}
_OTHERS = {
    "hada_": "Hadamard products (LoHa)",
    "lokr_": "Kronecker products (LoKr)",
    "lora_mid": "a core between A and B (Tucker's form of LoCon)",
    "oft_": "rotations (OFT)",
    "diff": "whole differences",
}
_LONGEST = 64  # pieces of a name, more than any layer has
_THEIR_OWN = re.compile(r"_(input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks)_")
_WORD = re.compile(
    r"\d+|(down|up|transformer)_blocks|mid_block|attentions|resnets|(down|up)samplers|attn[12]|to_(q|k|v|out)|ff|net"
    r"|proj(_in|_out)?|conv([12]|_in|_out|_shortcut)?|time_emb_proj|(time|add)_embedding|linear_[12]"
    r"|text_model|encoder|layers|self_attn|(q|k|v|out)_proj|mlp|fc[12]|text_projection"
)


def recognises(path: Path) -> bool:
    """Whether a file's tensors have kohya's prefixes."""
    return any(key.startswith(tuple(_PARTS)) for key in file.names_in(path))


def read(path: Path, told: Told) -> Exchange:
    """What the file holds, by the paths that diffusers gives the layers (`unet.mid_block.attentions.0.proj_in`).

    Raises:
        BadAdapterFile: every tensor of another method, and every layer whose path is not clear or whose shapes are not.
    """
    values, metadata = file.tensors_in(path)
    layers: dict[str, dict[str, Value]] = {}
    faults = []
    for key, value in values.items():
        name, _, end = key.partition(".")
        faults += [] if end in _ENDS else [_strange(key, end)]
        layers.setdefault(name, {})[_ENDS.get(end, end)] = value
    found = [] if faults else [_update(name, layer, told, faults) for name, layer in layers.items()]
    updates = tuple(update for update in found if update is not None)
    counted = Counter(update.path for update in updates)
    faults += [f"{path} stands there under two names" for path, count in counted.items() if count > 1]
    if faults:
        raise BadAdapterFile(path, faults)
    base = told.base or metadata.get("ss_sd_model_name")
    return Exchange("kohya", updates, base=base, config=metadata | _alphas(layers.values()))


def _strange(key: str, end: str) -> str:
    what = next((words for start, words in _OTHERS.items() if end.startswith(start)), None)
    return f"{key} is {f'of {what}' if what else 'nothing'} that a low-rank update B A has a place for"


def _update(name: str, layer: Mapping[str, Value], told: Told, faults: list[str]) -> Update | None:
    paths = list(_paths(name))
    if len(paths) != 1:
        faults.append(_unclear(name))
        return None
    alpha = file.number(layer["alpha"]) if "alpha" in layer else told.alpha
    update = file.update_of(paths[0], layer, alpha or float(file.rank_in(layer)), faults)
    return update and _with_magnitude(update, faults)


def _paths(name: str) -> Iterator[str]:
    """Every path in diffusers' models that a name may stand for.

    >>> list(_paths("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"))
    ['text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj']
    """
    for prefix, part in _PARTS.items():
        if name.startswith(prefix) and name.count("_") < _LONGEST:
            yield from (f"{part}.{path}" for path in _readings(name.removeprefix(prefix)))


def _readings(flat: str) -> Iterator[str]:
    """Every path of known words and numbers that is `flat` once its dots are underscores."""
    for found in re.finditer("_|$", flat):
        head, tail = flat[: found.start()], flat[found.end() :]
        if _WORD.fullmatch(head):
            yield from (f"{head}.{rest}" for rest in _readings(tail)) if tail else [head]


def _unclear(name: str) -> str:
    if _THEIR_OWN.search(name):
        return f"{name} is named as in the model's first code, of which lorakit knows no layers, only diffusers' names"
    return f"{name} does not tell which of its underscores were dots"


def _with_magnitude(update: Update, faults: list[str]) -> Update:
    """DoRA's magnitude in PEFT's shape: (O,), of a convolution (1, O, 1, 1)."""
    magnitude, out = update.magnitude, update.b.shape[0]
    if magnitude is None:
        return update
    if magnitude.shape[:1] != (out,):
        faults.append(f"{update.path} has a dora_scale {magnitude.shape} over its inputs; DoRA's is over outputs")
    return replace(update, magnitude=_shaped(magnitude, (out,) if update.form == "linear" else (1, out, 1, 1)))


def _shaped(value: Value, shape: tuple[int, ...]) -> Value:
    return value.then(lambda tensor: tensor.reshape(shape), shape)


def _alphas(layers: Iterable[Mapping[str, Value]]) -> dict[str, str]:
    """In which dtype the alphas stand, where all do in one that is not A's."""
    told = [(layer["alpha"].dtype if "alpha" in layer else None, layer["a"].dtype) for layer in layers]
    found = {("none" if kind is None else NAMES.get(kind, ""), NAMES.get(dtype, "")) for kind, dtype in told}
    kinds = {kind for kind, _ in found}
    usual = all(kind == dtype for kind, dtype in found)
    return {} if usual or len(kinds) > 1 else {ALPHAS: kinds.pop()}


def write(exchange: Exchange, out: Path, told: Told) -> list[str]:
    """The same tensors under kohya's names.

    Raises:
        BadAdapterFile: something else than low-rank updates of linear layers and convolutions, a layer of no UNet or
            CLIP text encoder of diffusers', a value that is not finite.
        LorakitError: `out` does not end in .safetensors, exists, or cannot be written.
    """
    prefixes = _prefixes(exchange)
    names = {update.path: _name(update.path, prefixes) for update in exchange.updates}
    faults = [*file.unsaid(exchange, TITLE, ("linear", "convolution"), ("magnitude",))]
    faults += [f"{path} has no kohya name that can be read back" for path, name in names.items() if not name]
    if faults:
        raise BadAdapterFile("the adapter", faults)
    header = file.texts(exchange, "kohya")
    kind = header.pop(ALPHAS, None)
    values: dict[str, Value] = {}
    lost = 0.0
    for update in exchange.updates:
        name, alpha = names[update.path], file.plain_alpha(update)
        values |= {f"{name}.{end}": value for end, value in _tensors(update).items()}
        if kind != "none" or alpha != update.rank:
            written = _alpha(alpha, DTYPES.get(kind or "", update.a.dtype))
            values[f"{name}.alpha"] = value_of(written)
            lost = max(lost, abs(float(written) - alpha) / abs(alpha) if alpha else 0.0)
    file.write_safetensors(out, values, header)
    return [f"alphas are rounded: relative error at most {lost:.1e}"] if lost else []


def _prefixes(exchange: Exchange) -> dict[str, str]:
    """kohya's word for each part; the one text encoder of an older model has another than the first of two."""
    several = "xl" in str(exchange.config.get("ss_base_model_version")) or any(
        re.match(r"text_encoder_2\.|unet\..*\.transformer_blocks\.[1-9]", update.path) for update in exchange.updates
    )
    left_out = "lora_te_" if several else "lora_te1_"
    return {part: prefix for prefix, part in _PARTS.items() if prefix != left_out}


def _name(path: str, prefixes: Mapping[str, str]) -> str | None:
    part, _, rest = path.partition(".")
    name = prefixes.get(part, "") + rest.replace(".", "_")
    return name if list(_paths(name)) == [path] else None


def _tensors(update: Update) -> dict[str, Value]:
    found = {"lora_down.weight": update.a, "lora_up.weight": update.b}
    if update.magnitude is None:
        return found
    return found | {"dora_scale": _shaped(update.magnitude, (update.b.shape[0], *[1] * (len(update.b.shape) - 1)))}


def _alpha(alpha: float, dtype: torch.dtype) -> Tensor:
    """A scalar of this dtype where that holds it exactly, otherwise of float32."""
    exact = torch.tensor(alpha, dtype=torch.float64)
    return exact.to(dtype) if float(exact.to(dtype)) == alpha else exact.float()
