"""Recognise the base that an adapter was trained on, by a few sampled values of each matrix it adapts."""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.experts import WEIGHT, experts_of
from lorakit.core.quantised import bits_of, floats_of
from lorakit.core.sites import modules_of, sites_of
from lorakit.core.state import state_or_new

SAMPLES = 256  # values a matrix, at fixed places
MOST_LABELS = 2**20  # transformers names every label
TOLERANCE = 2.0**-7  # relative: a base cast to bf16 and back is still the same base
KEPT = "_lorakit_sample"  # on a weight that is shared out over processes: its sample from before
ROUGH = 0.25  # of the sample's length: so far may quantisation move it; another base's sample is further away than 1

log = logging.getLogger("lorakit")


def fingerprint(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """The model's class and number of labels, and shape and sampled bf16 values of the weight at each path, as JSON.

    Of a module that has no weight of its own (a block), those below it are sampled; of a quantised layer, what its
    codes stand for, with the `bits` of a code.
    """
    places = {place for path in set(paths) for place in _weighted(model, path)}
    found = {place: _sampled(model, place) for place in sorted(places)}
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return {
        "architecture": type(model).__name__,
        "labels": int(getattr(getattr(model, "config", None), "num_labels", 0)) if classifies else 0,
        "samples": {path: sample for path, sample in found.items() if sample is not None},
    }


@contextmanager
def samples_kept(model: nn.Module) -> Iterator[None]:
    """Keep the samples of all matrices, where these are shared out over processes inside the block."""
    found = fingerprint(model, [site.path for site in sites_of(model) if site.has_matrix])["samples"]
    yield
    for path, sample in found.items():
        vars(_parameter(model, path)[2])[KEPT] = sample


def _kept(model: nn.Module, path: str) -> Mapping[str, Any] | None:
    """The sample of a weight that is shared out."""
    return getattr(_parameter(model, path)[2], KEPT, None)


def _sampled(model: nn.Module, path: str) -> Mapping[str, Any] | None:
    """Shape and sampled values of the weight at a path."""
    kept = _kept(model, path)
    weight = None if kept else _weight(model, path)
    if weight is None or weight.is_meta:
        return kept
    return {"shape": list(weight.shape), "bf16": _encode(_sample(weight))} | _bits(model, path)


def _bits(model: nn.Module, path: str) -> dict[str, float]:
    bits = bits_of(_module(model, path) or model)
    return {} if bits is None else {"bits": bits}


def fingerprint_faults(told: object) -> list[str]:
    """What is wrong with a fingerprint that a file tells, whatever the model."""
    wanted = {"architecture": str, "labels": int, "samples": Mapping[str, Any]}
    faults = misfits(told, wanted, "its base", required=wanted)
    if not isinstance(told, dict) or faults:
        return faults
    if not 0 <= told["labels"] <= MOST_LABELS:
        faults.append(f"its base has {told['labels']} labels")
    for path, sample in told["samples"].items():
        what, types = f"its base's sample of {path}", {"shape": list[int], "bf16": str, "bits": float}
        bad = misfits(sample, types, what, required=("shape", "bf16"))
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
    faults: list[str] = []
    other: list[str] = []
    rough: list[str] = []
    for path, sample in saved.get("samples", {}).items():
        kept = _kept(model, path)
        weight = None if kept else _weight(model, path)
        if kept is not None and not _is_same(kept, sample):
            other.append(path)
        if weight is None:
            continue
        if list(weight.shape) != sample["shape"]:
            faults.append(f"{path} has shape {tuple(weight.shape)} here and {tuple(sample['shape'])} in its base")
        elif not weight.is_meta and not _are_equal(sample, weight):
            near = same_values(sample, weight, quantised=bool(_bits(model, path)))
            (rough if near else other).append(path)
    if other:
        faults.append(
            f"it was trained on another base: {len(other)} of {len(saved['samples'])} sampled matrices have other "
            f"values (first: {other[0]})"
        )
    if rough and not other:
        log.warning("%d weights (first: %s) are the adapter's base only up to quantisation, which one of the two has "
                    "and the other has not", len(rough), rough[0])  # fmt: skip
    return faults


def same_values(sample: Mapping[str, Any], weight: Tensor, *, quantised: bool = False) -> bool:
    """Whether a weight has the values that were sampled, up to bf16's rounding.

    Where the weight is `quantised`, or the sampled one was, up to what quantisation changes.
    """
    may_differ = quantised or "bits" in sample
    return _are_equal(sample, weight) or (may_differ and _are_near(sample, weight))


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    values = _decode(one["bf16"]).float(), _decode(other["bf16"]).float()
    return one["shape"] == other["shape"] and torch.allclose(*values, rtol=TOLERANCE, atol=1e-6)


def _are_equal(sample: Mapping[str, Any], weight: Tensor) -> bool:
    own, told = _sample(weight).float(), _decode(sample["bf16"]).float()
    return list(weight.shape) == sample["shape"] and torch.allclose(own, told, rtol=TOLERANCE, atol=1e-6)


def _are_near(sample: Mapping[str, Any], weight: Tensor) -> bool:
    own, told = _sample(weight).float(), _decode(sample["bf16"]).float()
    return list(weight.shape) == sample["shape"] and bool((own - told).norm() <= ROUGH * told.norm())


def _weight(model: nn.Module, path: str) -> Tensor | None:
    """The base's own weight at a path, also while something is merged into it."""
    module, name, own = _parameter(model, path)
    if module is None or own is None:
        return None
    weight = floats_of(module, name, state_or_new(model).original(own).detach())
    return weight if weight.is_floating_point() else None


def _parameter(model: nn.Module, path: str) -> tuple[nn.Module | None, str, nn.Parameter | None]:
    """A module, the name of its weight, and that; the path is the module's, or the parameter's."""
    module, name = _module(model, path), WEIGHT
    if module is None or module._parameters.get(name) is None:
        above, _, name = path.rpartition(".")
        module = _module(model, above)
    return module, name, None if module is None else module._parameters.get(name)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
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


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.view(torch.int16).numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int16).view(torch.bfloat16)
