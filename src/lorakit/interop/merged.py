"""Fold an adapter into a checkpoint on disk, tensor by tensor: a model larger than memory can be merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import files
from lorakit.core.atomic import new_folder
from lorakit.core.attach import new_deltas
from lorakit.core.delta import Delta
from lorakit.core.fingerprint import same_values
from lorakit.core.merge import folded
from lorakit.core.plan import MODULE
from lorakit.errors import BadAdapterFile, BadModel, NotMergeable, OutputExists
from lorakit.interop.shards import INDEX, NAMES, SINGLE, Entry, entries, shards_of, write_header, write_tensor

Watch = Callable[[str, int, int], None]


@torch.no_grad()
def merge_checkpoint(
    base: Path, adapter: Path, out: Path, *, any_base: bool = False, watch: Watch | None = None
) -> None:
    """Write a complete transformers folder: the base with the adapter folded in, shard for shard.

    Memory holds one layer's tensors at a time. Each merged weight is computed in float32 and rounded once to the dtype
    of the checkpoint. The folder appears whole or not at all.

    Args:
        base: a model folder with safetensors weights.
        adapter: an adapter folder.
        out: a folder that does not exist yet.
        any_base: skip the comparison with the base that the adapter was trained on.
        watch: called with each tensor's name, its number and how many there are.

    Raises:
        OutputExists: `out` is there already.
        BadModel: the base lacks weights that the adapter changes, or cannot be read.
        BadAdapterFile: the adapter does not fit the base.
        NotMergeable: a delta is not a change of weights.
    """
    if out.exists():
        raise OutputExists(f"{out} exists already; name a new folder for the merged model")
    shards = {shard: entries(shard) for shard in shards_of(base)}
    model, deltas, saved = _adapter(base, adapter, any_base=any_base)
    job = _Job(model, deltas, saved, {key: entry for found in shards.values() for key, entry in found.items()})
    with new_folder(out) as folder:
        _copy_the_rest(base, folder)
        _write_config(folder, model)
        _write_shards(job, list(shards.items()), folder, watch or (lambda *_: None))


def _adapter(base: Path, adapter: Path, *, any_base: bool) -> tuple[nn.Module, dict[str, list[Delta]], dict[str, Any]]:
    """The base's skeleton on the meta device, and the adapter's deltas by module path, with their values."""
    config, header, tensors = files.read(adapter)
    saved = (header or {}).get("base", {})
    model = _skeleton(base, saved)
    record, tensors = files.described(model, adapter, config, header, tensors, any_base=any_base)
    with torch.random.fork_rng(devices=[]):
        deltas = [delta.to_empty(device="cpu") for _, delta in new_deltas(model, record.method, record.plan)]
    faults = files.fill(record, deltas, tensors) + [f"{key} is not part of it" for key in sorted(tensors)]
    if faults:
        raise BadAdapterFile(adapter, faults)
    by_path: dict[str, list[Delta]] = {}
    for delta in deltas:
        by_path.setdefault(delta.placement.path, []).append(delta)
    return model, by_path, {} if any_base else saved.get("samples", {})


def _skeleton(base: Path, saved: Mapping[str, Any]) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(base)
    if saved.get("labels"):
        config.num_labels = saved["labels"]
    name = saved.get("architecture") or (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise BadModel(f"{base} is a {name}, which this transformers ({transformers.__version__}) does not know")
    if not isinstance(config, kind.config_class):
        raise BadAdapterFile("the adapter", [f"its base is a {name}, but {base} is of the type {config.model_type}"])
    config.architectures = [name]
    with torch.device("meta"):
        return kind(config)


class _Job:
    """What is to be merged: tensors by their names in the model, the deltas beside them."""

    def __init__(
        self, model: nn.Module, deltas: dict[str, list[Delta]], saved: dict[str, Any], found: dict[str, Entry]
    ) -> None:
        self.own = {name for name, _ in model.named_parameters()}
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.deltas, self.saved = deltas, saved
        self.found = {self.name(key): entry for key, entry in found.items()}
        self.fresh = dict(self._fresh())

    def name(self, key: str) -> str:
        """The model's name for a tensor of the checkpoint (which may have been saved without the head's prefix)."""
        if key in self.own:
            return key
        if self.prefix + key in self.own:
            return self.prefix + key
        return key.removeprefix(self.prefix) if key.removeprefix(self.prefix) in self.own else key

    def changed(self, name: str) -> Tensor | None:
        """The merged value of a tensor, or None where the adapter leaves it alone."""
        path, _, parameter = name.rpartition(".")
        if path not in self.deltas:
            return None
        values = {key.rpartition(".")[2]: entry.read() for key, entry in self.found.items() if _parent(key) == path}
        self._verify(path, values)
        new = folded(values, [(self.deltas[path], None)]).get(parameter)
        if new is not None and not new.isfinite().all():
            raise NotMergeable(f"merging gives {name} a value that is not finite")
        return new

    def _verify(self, path: str, values: Mapping[str, Tensor]) -> None:
        sample = self.saved.get(path)
        if sample is not None and not same_values(sample, values["weight"]):
            raise BadAdapterFile("the adapter", [f"it was trained on another base: {path} has other values"])

    def _fresh(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the adapter brings and the checkpoint lacks (a task's head)."""
        for path, deltas in self.deltas.items():
            known = {name for name in self.found if _parent(name) == path}
            whole = [delta for delta in deltas if delta.placement.kind == MODULE]
            if not known and not whole:
                raise BadModel(f"the base has no weights of {path}, which the adapter changes")
            for delta in whole:
                merged = delta.merged({}).items()
                yield from ((f"{path}.{key}", value) for key, value in merged if f"{path}.{key}" not in known)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _copy_the_rest(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth")
        if path.is_file() and not weights and path.name != INDEX:
            shutil.copy(path, folder / path.name)


def _write_config(folder: Path, model: Any) -> None:
    model.config.save_pretrained(folder)


def _write_shards(job: _Job, shards: list[tuple[Path, dict[str, Entry]]], folder: Path, watch: Watch) -> None:
    total, number = sum(len(found) for _, found in shards), 0
    where: dict[str, str] = {}
    for shard, found in shards:
        extra = job.fresh if shard == shards[-1][0] else {}
        listed = [(job.name(key), entry.dtype, entry.shape, entry.size) for key, entry in found.items()]
        listed += [(key, NAMES[value.dtype], tuple(value.shape), value.nbytes) for key, value in extra.items()]
        with (folder / shard.name).open("wb") as file:
            write_header(file, listed)
            for key, entry in found.items():
                number += 1
                watch(job.name(key), number, total)
                _write_one(job, file, key, entry)
            for value in extra.values():
                write_tensor(file, value)
        where |= {name: shard.name for name, *_ in listed}
    if [shard.name for shard, _ in shards] != [SINGLE]:
        size = sum(entry.size for _, found in shards for entry in found.values())
        index = {"metadata": {"total_size": size + sum(v.nbytes for v in job.fresh.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_one(job: _Job, file: Any, key: str, entry: Entry) -> None:
    new = job.changed(job.name(key))
    if new is None:
        for chunk in entry.chunks():
            file.write(chunk)
    else:
        write_tensor(file, new)
