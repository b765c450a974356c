"""What llama.cpp calls a model's layers, and how it orders their rows: facts of its converter, by architecture.

It rotates neighbouring rows of q and k where transformers rotates the two halves of a head, so for some architectures
its converter reorders these rows; for others it undoes the interleaving of q, k and v by head in a fused layer.

Legend: O out (rows), H heads, P parts of a head or of a fused layer, D rows of each.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core import registry
from lorakit.core.exchange import Update
from lorakit.core.values import Value
from lorakit.errors import BadModel
from lorakit.interop._gguf_file import Header, read_header
from lorakit.models.loading import PACKAGED
from lorakit.models.quiet import quiet

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
MOST_BLOCKS = 10_000  # a table of names is made for each of them
MOVED = {"kept": (), "paired": ("attn_q", "attn_k"), "grouped": ("attn_qkv",)}  # layers whose rows change places


@dataclass(frozen=True)
class Kind:
    """An architecture of GGUF, as llama.cpp's converter makes it of transformers' models."""

    types: tuple[str, ...]  # the models' types; the paths of layers are those of the first
    rows: Literal["kept", "paired", "grouped"] = "kept"  # paired: halves of q's and k's heads; grouped: q, k, v by head
    prefix: str = ""  # of a path, which the package's table leaves away


KINDS = {
    "llama": Kind(("llama", "mistral", "mixtral"), "paired"),
    "mistral3": Kind(("ministral3",), "paired"),
    "smollm3": Kind(("smollm3",), "paired"),
    "granite": Kind(("granite",), "paired"),
    "olmo": Kind(("olmo",), "paired"),
    "gptneox": Kind(("gpt_neox",), "grouped"),
    "bloom": Kind(("bloom",), "grouped", prefix="transformer."),
    "qwen2": Kind(("qwen2",)),
    "qwen3": Kind(("qwen3",)),
    "qwen2moe": Kind(("qwen2_moe",)),
    "qwen3moe": Kind(("qwen3_moe",)),
    "gemma": Kind(("gemma",)),
    "gemma2": Kind(("gemma2",)),
    "gemma3": Kind(("gemma3_text",)),
    "phi2": Kind(("phi",)),
    "phi3": Kind(("phi3",)),
    "gpt2": Kind(("gpt2",)),
    "starcoder2": Kind(("starcoder2",)),
    "stablelm": Kind(("stablelm",)),
    "olmo2": Kind(("olmo2", "olmo3")),
    "olmoe": Kind(("olmoe",)),
    "command-r": Kind(("cohere",)),
}


@dataclass(frozen=True)
class Layout:
    """A model as llama.cpp lays it out."""

    architecture: str
    blocks: int
    heads: int | None  # None where only the base could tell
    kv_heads: int | None
    tied: bool = False  # whether the embedding is the head
    shapes: Mapping[str, tuple[int, ...]] | None = None  # of its tensors, where its GGUF file is at hand

    def __post_init__(self) -> None:
        if self.architecture not in KINDS:
            raise BadModel(f"how llama.cpp orders the rows of the architecture {self.architecture} is not known here; "
                           f"known are {', '.join(KINDS)}")  # fmt: skip

    def tensor(self, path: str) -> str | None:
        """GGUF's name for the weight of a layer; None where it has none.

        >>> Layout("llama", blocks=2, heads=4, kv_heads=2).tensor("model.layers.1.self_attn.k_proj")
        'blk.1.attn_k.weight'
        """
        names, prefix = _names(self.architecture, self.blocks), KINDS[self.architecture].prefix
        found = names.get_name(path) or names.get_name(path.removeprefix(prefix))
        return f"{found}.weight" if found else None

    def path(self, tensor: str) -> str | None:
        """The layer whose weight has this name in GGUF; None where there is none."""
        number = re.search(r"\.(\d+)\.", tensor)
        first = tensor if number is None else tensor.replace(number[0], ".0.", 1)
        path = _paths(self.architecture).get(first)
        return path if path is None or number is None else path.replace(".0.", number[0], 1)

    def order(self, tensor: str, rows: int) -> Tensor | None:
        """For each row of a tensor in GGUF its row in transformers; None where they are the same.

        Raises:
            BadModel: it depends on the number of heads, which is not known, or which does not divide the rows.

        >>> Layout("llama", blocks=1, heads=1, kv_heads=1).order("blk.0.attn_q.weight", 6).tolist()
        [0, 3, 1, 4, 2, 5]
        """
        rule, layer = KINDS[self.architecture].rows, tensor.split(".")[-2]
        if layer not in MOVED[rule]:
            return None
        heads, parts = self.kv_heads if layer == "attn_k" else self.heads, 2 if rule == "paired" else 3
        if heads is None:
            raise BadModel(f"the order of the rows of {tensor} depends on the number of heads, which only the base "
                           "tells; name the base's folder or GGUF file")  # fmt: skip
        if heads < 1 or rows % (heads * parts):
            raise BadModel(f"{tensor} has {rows} rows, which cannot be those of {heads} heads")
        places_HPD = torch.arange(rows).view(heads, parts, -1)
        return (places_HPD.mT if rule == "paired" else places_HPD.transpose(0, 1)).flatten()

    def to_gguf(self, tensor: str, value: Value) -> Value:
        """A weight's rows, or B's, in GGUF's order."""
        order_O = self.order(tensor, value.shape[0])
        return value if order_O is None else value.then(lambda rows: rows[order_O])

    def from_gguf(self, tensor: str, value: Value) -> Value:
        """`to_gguf` undone."""
        order_O = self.order(tensor, value.shape[0])
        return value if order_O is None else value.then(lambda rows: rows[order_O.argsort()])

    def misfits(self, updates: Sequence[Update]) -> Iterator[str]:
        """Why updates belong to no tensor of the model, to one of another shape, or several to one."""
        names = [self.tensor(update.path) for update in updates]
        yield from (f"{name} is changed twice" for name, times in Counter(names).items() if name and times > 1)
        for update, name in zip(updates, names, strict=True):
            yield from self._misfit(update, name)

    def _misfit(self, update: Update, name: str | None) -> Iterator[str]:
        if update.form in ("convolution", "experts"):
            yield f"{update.path} adapts {update.form}, for which lorakit writes no GGUF"
        elif name is None or (update.form == "embedding") != (name == EMBEDDING):
            yield f"{update.path} has no name in GGUF for {self.architecture} of {self.blocks} blocks"
        elif self.tied and name in (EMBEDDING, HEAD):
            yield f"{update.path} shares its weight with another layer, since the base's embedding is its head"
        elif self.shapes is not None and name not in self.shapes:
            yield f"{update.path} is {name} in GGUF, which the base does not have"
        elif self.shapes is not None and self.shapes[name] != shape_of(update):
            yield f"{update.path} changes a weight of shape {shape_of(update)}, but {name} has {self.shapes[name]}"


def shape_of(update: Update) -> tuple[int, ...]:
    """The shape of the weight that an update belongs to: (out, in); (vocabulary, dimension) of an embedding."""
    shape = (update.b.shape[0], update.a.shape[-1])
    return shape[::-1] if update.form == "embedding" else shape


def layout_of(base: str) -> Layout:
    """How llama.cpp lays out a model that is named by a GGUF file, a folder, a packaged model or a hub id.

    Raises:
        BadModel: it cannot be read, or is of an architecture whose order of rows is not known here.
    """
    packaged = base.replace("_", "-") in registry.names(PACKAGED)
    path = registry.find(PACKAGED, base).model.path() if packaged else Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        return layout_in(read_header(path, lambda reason: BadModel(f"{path}: {reason}")))
    return _layout_by(_config(str(path) if os.path.exists(path) else base))


def layout_in(header: Header) -> Layout:
    """What a model's GGUF file says of its layout."""
    kind = header.values.get("general.type", "model")
    if kind != "model":
        raise BadModel(f"{header.path} is a GGUF file of the type {kind}, not of a model")
    if (parts := header.values.get("split.count", 1)) != 1:
        raise BadModel(f"{header.path} is one of {parts} parts; join them with llama-gguf-split --merge")
    shapes = {name: stored.shape for name, stored in header.tensors.items()}
    return replace(told_by(header), tied=HEAD not in shapes, shapes=shapes)


def told_by(header: Header) -> Layout:
    """What the keys of a GGUF file say of the layout; an adapter's need not tell of heads."""
    blocks, heads, kv_heads = map(header.entry, ("block_count", "attention.head_count", "attention.head_count_kv"))
    if any(not isinstance(number, int | None) for number in (blocks, heads, kv_heads)):
        raise BadModel(f"{header.path} has other numbers of heads in other blocks, which is not known here")
    if not 0 <= (blocks or 0) <= MOST_BLOCKS:
        raise BadModel(f"{header.path} says that it has {blocks} blocks, which no model has")
    return Layout(str(header.values.get("general.architecture")), blocks or 0, heads, kv_heads or heads)


def _config(name: str) -> Any:
    import transformers

    try:
        with quiet():
            local = os.path.isdir(name)
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # a config can be wrong in as many ways as there are models
        reason = " ".join(str(error).split())
        raise BadModel(f"the base {name} cannot be read; name its folder or GGUF file ({reason})") from error


def _layout_by(config: Any) -> Layout:
    found = next((name for name, kind in KINDS.items() if config.model_type in kind.types), config.model_type)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Layout(found, config.num_hidden_layers, heads, kv_heads, tied=bool(config.tie_word_embeddings))


@cache
def _names(architecture: str, blocks: int) -> Any:
    """The package's table from paths to names."""
    import gguf

    for number, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(number, blocks)
    raise BadModel(f"this gguf package does not know {architecture}; install a newer one: pip install -U gguf")


@cache
def _paths(architecture: str) -> dict[str, str]:
    """The table's inverse for a model of one block, by the paths that transformers has for it."""
    import transformers

    type = KINDS[architecture].types[0]
    if type not in transformers.CONFIG_MAPPING:
        raise BadModel(f"this transformers does not know {type}; install a newer one: pip install -U transformers")
    with quiet(), torch.device("meta"):
        config = transformers.AutoConfig.for_model(type, num_hidden_layers=1)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layout = Layout(architecture, 1, None, None)
    named = {path: layout.tensor(path) for path, _ in model.named_modules()}
    return {name: path for path, name in named.items() if name is not None}
