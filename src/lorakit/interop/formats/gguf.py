"""GGUF adapters, which llama.cpp reads: A and B by its names of the base's tensors, with B's rows in its order of them.

llama.cpp scales every B A by alpha / R with one alpha for all, and R from the tensor. Scales that no one alpha gives
are folded into B.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

import logging
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from lorakit.core.atomic import new_file
from lorakit.core.exchange import Exchange, Update
from lorakit.core.patterns import beyond
from lorakit.core.values import Value, cast
from lorakit.errors import BadAdapterFile
from lorakit.interop._folding import error, folded
from lorakit.interop._gguf_file import DTYPES, TYPES, Header, Stored, read_header
from lorakit.interop._gguf_names import EMBEDDING, Layout, layout_of, told_by
from lorakit.interop.format import Told

TITLE = "GGUF adapter"
KIND = "LORA".lower()  # what llama.cpp calls the only type of adapter that it reads
A, B = ".lora_a", ".lora_b"
NORM = "_norm.weight"  # tensors that llama.cpp passes over
HUB = "https://huggingface.co/"
_PAIR = struct.pack("<Q12sIQ4s", 12, b"adapter.type", 8, 4, KIND.encode())  # the key and its value, as they lie there

log = logging.getLogger("lorakit")


def recognises(path: Path) -> bool:
    """Whether a file is GGUF and its first keys say that it is an adapter, not a model."""
    try:
        with path.open("rb") as file:
            return _PAIR in file.read(1 << 16)
    except OSError:
        return False


def read(path: Path, told: Told) -> Exchange:
    """What a file holds, by transformers' paths and in its order of rows.

    Raises:
        BadAdapterFile: every fault of its header, names and shapes.
        BadModel: the architecture is not known, or the order of rows needs the base, which was not named.
    """
    header = read_header(path, lambda reason: BadAdapterFile(path, [reason]))
    if faults := list(_strange(header)):
        raise BadAdapterFile(path, faults)
    layout = _layout(header, told)
    pairs = _pairs(header)
    if faults := list(_misfits(pairs, layout)):
        raise BadAdapterFile(path, faults)
    alpha = header.values.get("adapter.lora.alpha") or 0.0
    updates = [_update(name, a, b, alpha, layout) for name, (a, b) in pairs.items()]
    return Exchange(format="gguf", updates=tuple(updates), base=told.base or _base(header))


def _strange(header: Header) -> Iterator[str]:
    values = header.values
    kind, type = values.get("general.type", "model"), values.get("adapter.type")
    if kind != "adapter":
        yield f"it is a GGUF file of the type {kind}, not of an adapter"
    elif type != KIND:
        yield f"it is a GGUF adapter of the type {type}, which llama.cpp does not read either"
    if any(key.startswith("adapter.alora.") for key in values):
        yield "it acts only after certain tokens (aLoRA), for which lorakit has no words"
    if not isinstance(values.get("adapter.lora.alpha", 0.0), float):
        yield "its alpha is no number"
    for name, stored in header.tensors.items():
        if not name.endswith(NORM) and not (name.endswith((A, B)) and len(stored.shape) == 2):
            yield f"its {name} of shape {stored.shape} is neither A nor B of a matrix"


def _layout(header: Header, told: Told) -> Layout:
    """The file's own, if it tells of heads; otherwise, and where it is at hand, the base's."""
    own = told_by(header)
    if told.base is None or (own.heads is not None and not Path(told.base).expanduser().exists()):
        return own
    layout = layout_of(told.base)
    if layout.architecture != own.architecture:
        made = f"it is made for {own.architecture}, but {told.base} is {layout.architecture}"
        raise BadAdapterFile(header.path, [made])
    return layout


def _pairs(header: Header) -> dict[str, tuple[Stored | None, Stored | None]]:
    """A and B by the name of the base's tensor."""
    found = {name: stored for name, stored in header.tensors.items() if not name.endswith(NORM)}
    coarse = sum(stored.type not in DTYPES for stored in found.values())
    if norms := len(header.tensors) - len(found):
        log.warning("%s holds %d norms, which llama.cpp passes over; they are left out", header.path, norms)
    if coarse:
        log.warning("%s holds %d tensors in blocks of few bits; they are read as float32", header.path, coarse)
    names = dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in found)
    return {name: (found.get(name + A), found.get(name + B)) for name in names}


def _misfits(pairs: dict[str, tuple[Stored | None, Stored | None]], layout: Layout) -> Iterator[str]:
    if not pairs:
        yield "it has no tensors"
    for name, (a, b) in pairs.items():
        if a is None or b is None:
            yield f"{name} lacks its {'A' if a is None else 'B'}"
        elif a.shape[name == EMBEDDING] != b.shape[1]:
            yield f"{name} has A of shape {a.shape} and B of shape {b.shape}, which cannot be multiplied"
        elif layout.path(name) is None:
            yield f"{name} is no layer that transformers has for {layout.architecture}"


def _update(name: str, a: Any, b: Any, alpha: float, layout: Layout) -> Update:
    return Update(
        path=str(layout.path(name)),
        a=_turned(_value(a)) if name == EMBEDDING else _value(a),
        b=layout.from_gguf(name, _value(b)),
        alpha=alpha or float(b.shape[1]),  # without alpha the scale is 1
        form="embedding" if name == EMBEDDING else "linear",
    )


def _value(stored: Stored) -> Value:
    return Value(stored.shape, DTYPES.get(stored.type, torch.float32), stored.read)


def _turned(value: Value) -> Value:
    return value.then(lambda tensor: tensor.T.contiguous(), value.shape[::-1])


def _base(header: Header) -> str | None:
    """The base's name: on the hub, if a link to it is there."""
    link, name = (header.values.get(f"general.base_model.0.{key}") for key in ("repo_url", "name"))
    return link.removeprefix(HUB) if isinstance(link, str) and link.startswith(HUB) else name


def write(exchange: Exchange, out: Path, told: Told) -> list[str]:
    """A file that llama.cpp applies to the base: tensors as they are, with B's rows in llama.cpp's order.

    Raises:
        BadAdapterFile: what no such file can express, layer by layer.
        BadModel: the base cannot be read, or how llama.cpp orders its rows is not known here.
        OutputExists: `out` is there already.
    """
    base, updates = told.base or exchange.base, exchange.updates
    if faults := list(_faults(exchange, base)):
        raise BadAdapterFile("the adapter", faults)
    layout = layout_of(str(base))
    if faults := list(layout.misfits(updates)):
        raise BadAdapterFile("the adapter", faults)
    alpha = _common(updates)
    bs = [_folded(update, alpha) for update in updates]
    tensors: dict[str, Value] = {}
    for update, (b, _) in zip(updates, bs, strict=True):
        name = str(layout.tensor(update.path))
        tensors[name + A] = _float(_turned(update.a) if name == EMBEDDING else update.a)
        tensors[name + B] = layout.to_gguf(name, _float(b))
    with new_file(out) as path:
        _write(path, layout.architecture, _keys(layout, alpha, exchange.base or str(base)), tensors)
    return list(_notes(updates, bs, alpha))


def _faults(exchange: Exchange, base: str | None) -> Iterator[str]:
    merge = "merge it into the base's GGUF file instead"
    yield from beyond(exchange.config)
    if not base:
        yield "it does not name its base, which tells the names and the order of rows; name its folder or GGUF file"
    if not exchange.updates:
        yield "it has no low-rank updates"
    for update in exchange.updates:
        if update.magnitude is not None:
            yield f"{update.path} is DoRA's, which llama.cpp has no words for; {merge}"
        if update.shift is not None:
            yield f"{update.path} has a bias of B, which llama.cpp has no words for"
        if not math.isfinite(_single(_wanted(update))):
            yield f"{update.path} has the alpha {update.alpha}"
    if exchange.whole:
        some = ", ".join(list(exchange.whole)[:3])
        yield f"it holds {len(exchange.whole)} tensors in place of the base's own ({some}), which llama.cpp cannot read"


def _wanted(update: Update) -> float:
    """The alpha that gives an update its scale under alpha / R."""
    return update.scale * update.rank if update.rooted else update.alpha


def _single(number: float) -> float:
    """A number as float32 holds it."""
    return float(torch.tensor(number, dtype=torch.float32))


def _common(updates: Sequence[Update]) -> float:
    """The alpha that most updates want; not 0, which llama.cpp takes for a scale of 1."""
    counts = Counter(_single(_wanted(update)) for update in updates if _single(_wanted(update)))
    return counts.most_common(1)[0][0] if counts else 1.0


def _float(value: Value) -> Value:
    return value if value.dtype in TYPES else cast(value, torch.float32)


def _folded(update: Update, alpha: float) -> tuple[Value, float]:
    """B' with alpha · B' = (the alpha wanted) · B Λ, and its relative error; B itself where only alpha is rounded."""
    factor = _wanted(update) / alpha
    if _single(_wanted(update)) == alpha and update.diagonal is None:
        return update.b, abs(factor - 1)
    return folded(update, factor), error(update, factor)


def _notes(updates: Sequence[Update], bs: Sequence[tuple[Value, float]], alpha: float) -> Iterator[str]:
    pairs = list(zip(updates, bs, strict=True))
    errors = [error for update, (b, error) in pairs if b is not update.b]
    rounded = max((error for update, (b, error) in pairs if b is update.b), default=0.0)
    others = sum(value.dtype not in TYPES for update in updates for value in (update.a, update.b))
    if errors:
        yield (f"{len(errors)} of {len(updates)} scales are folded into B, as llama.cpp has one alpha for all: "
               f"relative error at most {max(errors):.1e}")  # fmt: skip
    if rounded:
        yield f"alpha is {alpha} in the file's float32: relative error {rounded:.1e}"
    if others:
        yield f"{others} tensors of other dtypes are float32 in the file: relative error at most {2**-24:.1e}"


def _keys(layout: Layout, alpha: float, base: str) -> dict[str, str | int | float]:
    heads = {"attention.head_count": layout.heads, "attention.head_count_kv": layout.kv_heads}
    return {
        "general.type": "adapter",
        "adapter.type": KIND,
        "adapter.lora.alpha": alpha,
        "general.base_model.count": 1,
        "general.base_model.0.name": base,
        f"{layout.architecture}.block_count": layout.blocks,
        **{f"{layout.architecture}.{key}": number for key, number in heads.items() if number},
    }


def _write(path: Path, architecture: str, keys: dict[str, str | int | float], tensors: dict[str, Value]) -> None:
    import gguf
    import numpy

    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        add: dict[type, Any] = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        for key, told in keys.items():
            add[type(told)](key, told)
        for name, value in tensors.items():
            number = gguf.GGMLQuantizationType(TYPES[value.dtype])
            writer.add_tensor_info(name, value.shape, numpy.dtype("f4"), value.bytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in tensors.items():
            tensor = value.read().contiguous()
            if not bool(tensor.isfinite().all()):
                raise BadAdapterFile("the adapter", [f"{name} holds values that are not finite real numbers"])
            writer.write_tensor_data(tensor.view(-1).view(torch.uint8).numpy())
