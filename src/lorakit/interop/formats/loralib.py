"""Checkpoints of loralib, the code of LoRA's authors: `torch.save(lora_state_dict(model))`.

The file holds `X.lora_A` and `X.lora_B`, and trained biases and heads under the base's names: alpha must be told. What
its matrices mean depends on the layer X: the base tells it; without the base, the layers' names do.

* Linear: A (R, I), B (O, R). Embedding: A (R, V), B (D, R).
* MergedLinear, several layers in one, P of them adapted: A (P R, I), B (P O', R). Which these are is in the width of
  the base where all are, otherwise it must be told. In an exchange: A as it is, B (O, P R) with zeros between.
* Conv2d with a K x K kernel: A (R K, C K), B (O K, R K); B A has the kernel's numbers in the kernel's order. In an
  exchange: rank R K², to the bit; or, where no kernel of this size has that rank, the whole kernel and an identity.

Legend: R rank, I in, O out, V vocabulary, D dimension, P parts, S slots for parts, K kernel, C channels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorakit.core.atomic import new_file
from lorakit.core.exchange import Exchange, Update
from lorakit.core.layouts import Conv2dLayout, EmbeddingLayout, Layout, kind_of, layout_of
from lorakit.core.patterns import plain
from lorakit.core.pickles import SUFFIXES, read_pickle
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile, LorakitError, nearest
from lorakit.interop.checkpoint import skeleton
from lorakit.interop.format import Told
from lorakit.interop.formats import _loralib_layers as layers
from lorakit.interop.formats import _one_file as file
from lorakit.models import folder

TITLE = "loralib checkpoint"
WITHIN = ("model_state_dict", "state_dict")
Layer = dict[str, Value]
Enabled = tuple[bool, ...] | None
_ENDS = {".lora_A": "a", ".lora_B": "b"}
_EMBEDDING = re.compile(
    r"wte|wpe|emb|shared|embed(ding)?s?|embed_(tokens|positions|in)|(word|tok|token|token_type|position)_embeddings?"
)
_CONVOLUTION = re.compile(r"conv|downsample|patch_embed")
_MERGED = "into which loralib's eval() merges it; save lora_state_dict(model) instead of the whole model"


def recognises(path: Path) -> bool:
    """Whether a file has loralib's names; so it is for a pickle with such names that `read` refuses, saying why."""
    if any(key.endswith(tuple(_ENDS)) for key in file.names_in(path, WITHIN)):
        return True
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    try:
        read_pickle(path, WITHIN)
    except BadAdapterFile:
        with path.open("rb") as opened:
            return b"lora_A" in opened.read(1 << 20)  # where torch.save puts the names
    return False


def read(path: Path, told: Told) -> Exchange:
    """What the checkpoint holds; alpha is the caller's, and the base's layers say what its matrices mean.

    Raises:
        BadAdapterFile: alpha is not told, a tensor is neither loralib's nor the base's, matrices do not fit each other
            or the base's layer, a layer's own weight stands beside them, a layer's kind is not clear; every fault.
        BadModel, UnknownName: the base cannot be read.
    """
    values, _ = file.tensors_in(path, WITHIN)
    wrapped = all(key.startswith("module.") for key in values)  # by DataParallel
    found, whole = _sorted_out({key.removeprefix("module.") if wrapped else key: v for key, v in values.items()})
    faults = [*_faults(found, whole)]
    faults += ["loralib's files do not hold alpha; tell it (--alpha)"] if told.alpha is None else []
    layouts = _layouts(told.base, found, faults) if told.base and not faults else {}
    if faults or told.alpha is None:
        raise BadAdapterFile(path, faults)
    updates = []
    for name, layer in found.items():
        try:
            updates.append(_update(name, layer, told.alpha, layouts.get(name), told.enabled))
        except ValueError as error:
            faults.append(f"{name} {error}")
    if faults:
        raise BadAdapterFile(path, faults)
    return Exchange("loralib", tuple(updates), whole, base=told.base)


def _sorted_out(values: Mapping[str, Value]) -> tuple[dict[str, Layer], Layer]:
    """The matrices by layer, and the tensors in place of the base's own; loralib puts a convolution into a `conv`."""
    found: dict[str, Layer] = {}
    rest: Layer = {}
    for key, value in values.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end:
            found.setdefault(key.removesuffix(end), {})[_ENDS[end]] = value
        else:
            rest[key] = value
    inner = {f"{path}.conv.{tail}": f"{path}.{tail}" for path in found for tail in ("weight", "bias")}
    return found, {inner.get(key, key): value for key, value in rest.items()}


def _faults(found: Mapping[str, Layer], whole: Layer) -> Iterator[str]:
    for path, layer in found.items():
        yield from (f"{path} lacks its {end[1:]}" for end, part in _ENDS.items() if part not in layer)
        if f"{path}.weight" in whole:
            yield f"{path} has its whole weight beside the update, {_MERGED}"
    yield from (f"{key} is no tensor of loralib's" for key in whole if "lora_" in key.rpartition(".")[2])


def _layouts(base: str, paths: Iterable[str], faults: list[str]) -> dict[str, Layout]:
    """What the base's layers are; none of it where `faults` got a reason."""
    modules = dict(skeleton(folder(base), {}).named_modules())
    layouts: dict[str, Layout] = {}
    for path in paths:
        layout = layout_of(modules[path]) if path in modules else None
        if layout is not None:
            layouts[path] = layout
        elif path in modules:
            faults.append(f"{path} is a {kind_of(modules[path])} in {base}, which has no matrix that lorakit knows")
        else:
            faults.append(f"{path} is no layer of {base}; {nearest(path, modules)}")
    return layouts


def _update(path: str, layer: Layer, alpha: float, layout: Layout | None, told: Enabled) -> Update:
    """One layer's update.

    Raises:
        ValueError: why the matrices cannot be that layer's.
    """
    a, b, name = layer["a"], layer["b"], path.rpartition(".")[2]
    _fit(len(a.shape) == 2 == len(b.shape) and b.shape[1] > 0 and a.shape[0] % b.shape[1] == 0, a, b, layout)
    if isinstance(layout, Conv2dLayout):
        out, channels, k = layout.out_features, layout.channels, layout.kernel[0]
        is_so = layout.kernel == (k, k) and a.shape[0] % k == 0
        _fit(is_so and a.shape == (b.shape[1], channels * k) and b.shape[0] == out * k, a, b, layout)
        return layers.convolution(path, a, b, alpha, (out, channels, k))
    if layout is None and _CONVOLUTION.search(name):
        raise ValueError("is a convolution by its name, whose kernel is not in the file; name the base (--base)")
    if isinstance(layout, EmbeddingLayout) or (layout is None and _EMBEDDING.fullmatch(name)):
        is_so = layout is None or (b.shape[0], a.shape[1]) == (layout.out_features, layout.in_features)
        _fit(is_so and a.shape[0] == b.shape[1], a, b, layout)
        return Update(path, a, b, alpha, form="embedding")
    enabled = _enabled(a, b, layout, told)
    return Update(path, a, b, alpha) if len(enabled) == 1 else layers.fused(path, a, b, alpha, enabled)


def _fit(is_so: bool, a: Value, b: Value, layout: Layout | None) -> None:
    if not is_so:
        raise ValueError(f"has A {a.shape} and B {b.shape}, which do not fit {layout or 'each other'}")


def _enabled(a: Value, b: Value, layout: Layout | None, told: Enabled) -> tuple[bool, ...]:
    """Which slots of a linear layer are adapted; an ordinary one has one.

    Without the base, one part may be one of several if the caller says that some layers have one.
    """
    parts = a.shape[0] // b.shape[1]
    slots = 1 if parts == 1 and (told is None or sum(told) > 1) else None
    _fit(b.shape[0] % parts == 0, a, b, layout)
    if layout is not None:
        out = layout.out_features * parts
        _fit(a.shape[1] == layout.in_features and out % b.shape[0] == 0, a, b, layout)
        slots = out // b.shape[0]
    if slots == parts:
        return (True,) * parts
    if told is None or sum(told) != parts or (slots is None and parts == 1) or len(told) != (slots or len(told)):
        raise ValueError(
            f"is {slots or 'several'} layers in one, {parts} of them adapted; which is not in the file: "
            "name the base (--base), and tell them (--enabled) if that is not enough"
        )
    return told


def write(exchange: Exchange, out: Path, told: Told) -> list[str]:
    """A file of `torch.save` for `load_state_dict(..., strict=False)`; says what the model must be built with.

    Raises:
        BadAdapterFile: something that loralib has no layer for, updates that no one alpha scales as they are scaled, a
            tensor that is not finite.
        LorakitError: `out` does not end as such files do, exists, or cannot be written.
    """
    faults = [*file.unsaid(exchange, TITLE, ("linear", "embedding", "convolution"), ("whole",))]
    doubled = [update.path for update in exchange.updates if f"{update.path}.weight" in exchange.whole]
    faults += [f"{path} has its whole weight beside the update, {_MERGED}" for path in doubled]
    if faults:
        raise BadAdapterFile("the adapter", faults)
    if out.suffix not in SUFFIXES:
        raise LorakitError(f"{out} should be a file whose name ends in .pt")
    stored = {update: _stored(update) for update in exchange.updates}
    alpha = _one_alpha({layer.path: update.scale * layer.rank for update, layer in stored.items()})
    tensors = {f"{layer.path}{end}": t for layer in stored.values() for end, t in zip(_ENDS, layer[1:3], strict=True)}
    inner = {f"{update.path}.bias": f"{update.path}.conv.bias" for update in stored if update.form == "convolution"}
    tensors |= {inner.get(name, name): value.read() for name, value in exchange.whole.items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        raise BadAdapterFile("the adapter", [f"{name} holds values that are not finite real numbers" for name in bad])
    _save(tensors, out)
    fused = {layer.enabled: layer.path for layer in stored.values() if len(layer.enabled) > 1}
    notes = [f"layers like {path} need enable_lora={list(enabled)}" for enabled, path in fused.items()]
    return [f"the file does not hold alpha: build the model with lora_alpha={plain(alpha)}", *notes]


def _save(tensors: Mapping[str, Tensor], out: Path) -> None:
    """`torch.save` in one step, without the memory around a view, and without the file's name, which it would hold."""
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    torch.save(own, buffer)
    with new_file(out) as path:
        path.write_bytes(buffer.getvalue())


def _stored(update: Update) -> layers.Stored:
    if update.form == "convolution":
        return layers.flat(update)
    if update.form == "linear":
        return layers.unfused(update)
    return layers.Stored(update.path, update.a.read(), update.b.read(), update.rank)


def _one_alpha(alphas: Mapping[str, float]) -> float:
    """The alpha of all layers, which loralib divides by each layer's own r."""
    low, high = min(alphas, key=alphas.__getitem__), max(alphas, key=alphas.__getitem__)
    if not math.isclose(alphas[low], alphas[high], rel_tol=1e-9):
        shown = f"{low} has alpha {alphas[low]:g}, {high} {alphas[high]:g}"
        raise BadAdapterFile("the adapter", [f"loralib takes one alpha for all layers, but {shown}; convert it to "
                                             "portable first (--to portable), which folds scales into B"])  # fmt: skip
    return alphas[low]
