"""A base on disk: its skeleton without values, and its tensors by their names in the model, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.experts import experts_of
from lorakit.core.layouts import layout_of
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile, BadModel, LorakitError
from lorakit.interop.shards import Entry, entries, shards_of


def skeleton(base: Path, saved: Mapping[str, Any]) -> nn.Module:
    """The base without values, on the meta device."""
    import transformers

    with _reading(base):
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        if saved.get("labels"):
            config.num_labels = saved["labels"]
        name = saved.get("architecture") or (config.architectures or ["AutoModel"])[0]
        kind: Any = getattr(transformers, name, None)
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if not is_model or kind.config_class is None:
            raise BadModel(f"{base} is a {name}, which transformers {transformers.__version__} has no model for")
        if not isinstance(config, kind.config_class):
            of_type = f"its base is a {name}, but {base} is of the type {config.model_type}"
            raise BadAdapterFile("the adapter", [of_type])
        config.architectures = [name]
        with torch.device("meta"):
            return kind(config)


@contextmanager
def _reading(base: Path) -> Iterator[None]:
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are models
        raise BadModel(f"{base} cannot be read as a model: {' '.join(str(error).split())}") from error


class Checkpoint:
    """The base's tensors on disk, by their names in the model."""

    def __init__(self, model: nn.Module, found: Mapping[str, Entry]) -> None:
        self.model = model
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.own = dict(model.named_parameters(remove_duplicate=False))
        self.found = {self.name(key): entry for key, entry in found.items()}
        self.shared = {id(self.own[name]): entry for name, entry in self.found.items() if name in self.own}

    def name(self, key: str) -> str:
        """The model's name for a tensor of the checkpoint (which may have been saved without the head's prefix)."""
        names = (key, self.prefix + key, key.removeprefix(self.prefix))
        return next((name for name in names if name in self.own), key)

    def check(self, path: str) -> None:
        """Refuse a module whose tensors here are not those that the config tells of."""
        for name, entry in self.found.items():
            if parent(name) == path and name in self.own and entry.shape != tuple(self.own[name].shape):
                told = tuple(self.own[name].shape)
                raise BadModel(f"{name} has shape {entry.shape} in {entry.shard}, but the model needs {told}")

    def entry(self, name: str) -> Entry | None:
        """A tensor by its name, or by that of one that shares its memory; None where the checkpoint has none."""
        return self.found.get(name) or self.shared.get(id(self.own.get(name)))

    def value(self, name: str) -> Tensor | None:
        """The values of `entry`."""
        entry = self.entry(name)
        return None if entry is None else entry.read()


def parent(name: str) -> str:
    """The path of the module that has a tensor of this name."""
    return name.rpartition(".")[0]


def tail(name: str) -> str:
    """What a tensor of this name is called in its module."""
    return name.rpartition(".")[2]


def opened_base(base: Path, architecture: str | None = None) -> Checkpoint:
    """The tensors of a model folder; `architecture` is the model's class (default: what its config names).

    Raises:
        BadModel: it cannot be read.
    """
    stored = {key: entry for shard in shards_of(base) for key, entry in entries(shard).items()}
    return Checkpoint(skeleton(base, {"architecture": architecture}), stored)


def copied(whole: Mapping[str, Value], base: Path) -> list[str]:
    """The names of those tensors of an adapter's that are the base's own, in the adapter's dtype.

    Raises:
        BadModel: the base cannot be read.
    """
    checkpoint = opened_base(base)
    pairs = [(name, value, checkpoint.value(name)) for name, value in whole.items()]
    return [name for name, value, own in pairs if own is not None and torch.equal(own.to(value.dtype), value.read())]


def weights(base: Path, architecture: str | None = None) -> dict[str, Value]:
    """Every matrix W (out, in) of a model folder by its layer's path, to be read when it is wanted.

    Those of stacked experts (E, out, in) go by the path of their parameter; a convolution's is (out, in height width).

    Args:
        base: a model folder with safetensors weights.
        architecture: the model's class (default: what its config names).

    Raises:
        BadModel: it cannot be read.
    """
    checkpoint = opened_base(base, architecture)
    found: dict[str, Value] = {}
    for path, module in checkpoint.model.named_modules():
        layout, entry = layout_of(module), checkpoint.entry(f"{path}.weight")
        if layout is not None and entry is not None:
            shape = layout.out_features, layout.in_features
            found[path] = entry.value.then(layout.matrix, shape)
        for name, experts in experts_of(module).items():
            entry = checkpoint.entry(f"{path}.{name}")
            if entry is not None:
                shape_EOI = experts.count, experts.out_features, experts.in_features
                found[f"{path}.{name}"] = entry.value.then(experts.matrices, shape_EOI)
    return found
