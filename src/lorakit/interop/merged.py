"""Fold an adapter into a checkpoint on disk, tensor by tensor: a model larger than memory can be merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import files
from lorakit.core.atomic import new_folder
from lorakit.core.attach import refuse_tied
from lorakit.core.delta import Delta, stands_in
from lorakit.core.fingerprint import same_values
from lorakit.core.merge import folded
from lorakit.core.plan import BIAS, MODULE
from lorakit.errors import BadAdapterFile, BadModel, NotMergeable, OutputExists
from lorakit.interop.checkpoint import Checkpoint, parent, skeleton, tail
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
        BadMethod: the adapter acts on one of two modules that share a weight.
        BadModel: the base lacks weights that the adapter changes, or cannot be read.
        BadAdapterFile: the adapter does not fit the base.
        NotMergeable: a delta is not a change of weights.
    """
    if out.exists():
        raise OutputExists(f"{out} exists already; name a new folder for the merged model")
    shards = {shard: entries(shard) for shard in shards_of(base)}
    found = files.read(adapter)
    saved = (found.header or {}).get("base", {})
    model = skeleton(base, saved)
    checkpoint = Checkpoint(model, {key: entry for each in shards.values() for key, entry in each.items()})
    record, deltas = files.fitted(model, adapter, found, any_base=any_base, base=checkpoint.value, device="cpu")
    refuse_tied(model, record.method, record.plan)
    job = _Job(model, checkpoint, [delta for _, delta in deltas], {} if any_base else saved.get("samples", {}))
    with new_folder(out) as folder:
        _copy_the_rest(base, folder)
        _write_config(folder, model)
        _write_shards(job, list(shards.items()), folder, watch or (lambda *_: None))


class _Job:
    """What is to be merged: the checkpoint, and the deltas by the paths of their modules."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, deltas: list[Delta], saved: dict[str, Any]) -> None:
        self.checkpoint, self.found, self.saved = checkpoint, checkpoint.found, saved
        self.deltas: dict[str, list[Delta]] = {}
        for delta in deltas:
            self.deltas.setdefault(delta.placement.path, []).append(delta)
        self.hosts = _hosts(model, self.deltas)
        self.tied = {id(checkpoint.own[name]): name for name in self.hosts}
        self.fresh = dict(self._fresh(model))

    def changed(self, name: str) -> Tensor | None:
        """The merged value of a tensor, or None where the adapter leaves it alone."""
        same = self.tied.get(id(self.checkpoint.own.get(name)), name)
        hosts = self.hosts.get(name) or self.hosts.get(same)
        if not hosts:
            return None
        entries = ((key, entry) for key, entry in self.found.items() if parent(key) == parent(name))
        values = {tail(key): entry.read() for key, entry in entries}
        self._verify(parent(same), values)
        for path, prefix in hosts:
            merged = folded({f"{prefix}{tail}": value for tail, value in values.items()}, [(self.deltas[path], None)])
            values |= {key.removeprefix(prefix): value for key, value in merged.items()}
        new = values[tail(name)]
        if not new.isfinite().all():
            raise NotMergeable(f"merging gives {name} a value that is not finite")
        return new

    def _verify(self, path: str, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            sample = self.saved.get(path if name == "weight" else f"{path}.{name}")
            if sample is not None and not same_values(sample, value):
                raise BadAdapterFile("the adapter", [f"it was trained on another base: {path} has other values"])

    def _fresh(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the adapter brings and the checkpoint lacks (a task's head)."""
        for path, deltas in self.deltas.items():
            self.checkpoint.check(path)
            for delta in deltas:
                if delta.placement.kind == MODULE:
                    merged = {f"{path}.{key}": value for key, value in delta.merged({}).items()}
                    yield from ((name, value) for name, value in merged.items() if name not in self.found)
                else:
                    self._refuse_absent(f"{path}.{key}" for key in _needed(delta, model.get_submodule(path)))

    def _refuse_absent(self, names: Iterable[str]) -> None:
        absent = next((name for name in names if self.checkpoint.entry(name) is None), None)
        if absent is not None:
            raise BadModel(f"the base has no weights {absent}, which the adapter changes; if its files name them "
                           "otherwise (one matrix an expert), merge the loaded model and save that")  # fmt: skip


def _needed(delta: Delta, module: nn.Module) -> list[str]:
    """The parameters that a module must have for a delta to be merged into it.

    Raises:
        NotMergeable: the delta is not a change of weights.
    """
    if delta.placement.kind == BIAS:
        return ["bias"]
    kind = type(delta)
    if kind.merged is Delta.merged and (kind.fold is Delta.fold or delta.layout is None):
        raise delta.refusal()
    return list(delta.weights(module)) if stands_in(delta) else ["weight"]


def _hosts(model: nn.Module, deltas: Mapping[str, list[Delta]]) -> dict[str, list[tuple[str, str]]]:
    """For each tensor that deltas change: the modules whose deltas do, outermost first, and the path to it in them."""
    hosts: dict[str, list[tuple[str, str]]] = {}
    for path in (path for path, _ in model.named_modules() if path in deltas):
        module = model.get_submodule(path)
        for key in dict.fromkeys(key for delta in deltas[path] for key in delta.weights(module)):
            hosts.setdefault(f"{path}.{key}", []).append((path, key.removesuffix(tail(key))))
    return hosts


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
        listed = [(job.checkpoint.name(key), entry.dtype, entry.shape, entry.size) for key, entry in found.items()]
        listed += [(key, NAMES[value.dtype], tuple(value.shape), value.nbytes) for key, value in extra.items()]
        with (folder / shard.name).open("wb") as file:
            write_header(file, listed)
            for key, entry in found.items():
                number += 1
                watch(job.checkpoint.name(key), number, total)
                _write_one(job, file, key, entry)
            for value in extra.values():
                write_tensor(file, value)
        where |= {name: shard.name for name, *_ in listed}
    if [shard.name for shard, _ in shards] != [SINGLE]:
        size = sum(entry.size for _, found in shards for entry in found.values())
        index = {"metadata": {"total_size": size + sum(v.nbytes for v in job.fresh.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_one(job: _Job, file: Any, key: str, entry: Entry) -> None:
    new = job.changed(job.checkpoint.name(key))
    if new is None:
        for chunk in entry.chunks():
            file.write(chunk)
    else:
        write_tensor(file, new)
