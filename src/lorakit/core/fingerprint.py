"""Recognise the base that an adapter was trained on, by a few sampled values of each matrix it adapts."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.experts import WEIGHT, experts_of
from lorakit.core.sites import modules_of
from lorakit.core.state import state_or_new

SAMPLES = 256  # values a matrix, at fixed places
MOST_LABELS = 2**20  # transformers names every label
TOLERANCE = 2.0**-7  # relative: a base cast to bf16 and back is still the same base


def fingerprint(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """The model's class and number of labels, and shape and sampled bf16 values of the weight at each path, as JSON.

    Of a module that has no weight of its own (a block), those below it are sampled.
    """
    places = {place for path in set(paths) for place in _weighted(model, path)}
    found = {place: _weight(model, place) for place in sorted(places)}
    weights = {path: weight for path, weight in found.items() if weight is not None and not weight.is_meta}
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return {
        "architecture": type(model).__name__,
        "labels": int(getattr(getattr(model, "config", None), "num_labels", 0)) if classifies else 0,
        "samples": {path: {"shape": list(w.shape), "bf16": _encode(_sample(w))} for path, w in weights.items()},
    }


def fingerprint_faults(told: object) -> list[str]:
    """What is wrong with a fingerprint that a file tells, whatever the model."""
    wanted = {"architecture": str, "labels": int, "samples": Mapping[str, Any]}
    faults = misfits(told, wanted, "its base", required=wanted)
    if not isinstance(told, dict) or faults:
        return faults
    if not 0 <= told["labels"] <= MOST_LABELS:
        faults.append(f"its base has {told['labels']} labels")
    for path, sample in told["samples"].items():
        what, types = f"its base's sample of {path}", {"shape": list[int], "bf16": str}
        bad = misfits(sample, types, what, required=types)
        faults += bad or ([] if _is_whole(sample) else [f"{what} is damaged"])
    return faults


def _is_whole(sample: Mapping[str, Any]) -> bool:
    try:
        size = len(base64.b64decode(sample["bf16"], validate=True))
    except ValueError:
        return False
    return size > 0 and size == 2 * min(SAMPLES, math.prod(sample["shape"]))


def differences(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What speaks against `model` being the base of a saved fingerprint; empty if nothing does."""
    faults, other = [], []
    for path, sample in saved.get("samples", {}).items():
        weight = _weight(model, path)
        if weight is None:
            continue
        if list(weight.shape) != sample["shape"]:
            faults.append(f"{path} has shape {tuple(weight.shape)} here and {tuple(sample['shape'])} in its base")
        elif not weight.is_meta and not same_values(sample, weight):
            other.append(path)
    if other:
        faults.append(
            f"it was trained on another base: {len(other)} of {len(saved['samples'])} sampled matrices have other "
            f"values (first: {other[0]})"
        )
    return faults


def same_values(sample: Mapping[str, Any], weight: Tensor) -> bool:
    """Whether a weight has the values that were sampled, up to bf16's rounding."""
    return list(weight.shape) == sample["shape"] and _close(_sample(weight), _decode(sample["bf16"]))


def _weight(model: nn.Module, path: str) -> Tensor | None:
    """The base's own weight at a path, also while something is merged into it."""
    own = _parameter(model, path, WEIGHT)
    if own is None:
        own = _parameter(model, *path.rpartition(".")[::2])
    weight = None if own is None else state_or_new(model).original(own)
    return weight.detach() if weight is not None and weight.is_floating_point() else None


def _parameter(model: nn.Module, path: str, name: str) -> nn.Parameter | None:
    try:
        return model.get_submodule(path)._parameters.get(name)
    except AttributeError:
        return None


def _weighted(model: nn.Module, path: str) -> list[str]:
    """The path itself (of stacked experts, their parameters'), or where it has no weight those below it that have."""
    module = model.get_submodule(path)
    below = (each for inner, inside in modules_of(module) for each in _own(f"{path}.{inner}", inside))
    return _own(path, module) or list(below)


def _own(path: str, module: nn.Module) -> list[str]:
    weight = [path] if module._parameters.get(WEIGHT) is not None else []
    return weight + [f"{path}.{name}" for name in experts_of(module)]


def _sample(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].to("cpu", torch.bfloat16)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=1e-6)


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.view(torch.int16).numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int16).view(torch.bfloat16)
