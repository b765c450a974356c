"""Save and load adapters: a PEFT folder, with what PEFT has no words for in the safetensors header.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT, vLLM and others read. The header's `lorakit` entry
holds format version, method, plan and the base's fingerprint. Writes are atomic and byte-deterministic.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lorakit.core.atomic import write_files
from lorakit.core.attach import new_deltas, put
from lorakit.core.delta import Delta
from lorakit.core.fingerprint import differences, fingerprint
from lorakit.core.method import Method, method_of_peft
from lorakit.core.plan import BIAS, LOW_RANK, MODULE, Placement, Plan
from lorakit.core.sites import modules_of
from lorakit.core.state import Attached, attached_to, deltas_of, idle
from lorakit.errors import BadAdapterFile, LorakitError, NeverActed, UnknownName
from lorakit.version import VERSION

log = logging.getLogger("lorakit")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
PREFIX = "base_model.model."
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


def save(model: nn.Module, name: str, folder: str | Path) -> None:
    """Write an adapter as a PEFT folder: atomically, and with the same bytes for the same adapter.

    Raises:
        NoSuchAdapter: no adapter of that name.
        NeverActed: some deltas were used since attaching and others never (a target the forward does not reach).
        LorakitError: the disk is full; nothing is half-written.

    Example:
        >>> import lorakit as lk, tempfile, os
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
        >>> lk.attach(model, lk.LoRA(rank=2), name="a")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lk.save(model, "a", folder + "/a")
        ...     sorted(os.listdir(folder + "/a"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    record, deltas = attached_to(model, name), deltas_of(model, name)
    resting = idle(model, name)
    if resting and len(resting) < len({delta.placement.path for delta in deltas}):
        raise NeverActed(
            f"{len(resting)} of {name!r}'s layers never acted since attaching, so they learned nothing: "
            f"{', '.join(resting[:3])}; choose targets that the model's forward uses"
        )
    config, tensors = record.method.to_peft(deltas)
    tensors = {PREFIX + key: _written(key, value) for key, value in (tensors | _replaced(record.plan, deltas)).items()}
    files = {CONFIG: _config(model, record, config), TENSORS: _with_header(tensors, _header(model, record))}
    write_files(Path(folder), files)


def _written(key: str, value: Tensor) -> Tensor:
    if value.is_meta or value.numel() == 0:
        raise LorakitError(f"{key} has no values here (meta device, or sharded away), so the adapter cannot be saved")
    return value.detach().cpu().contiguous()


def _replaced(plan: Plan, deltas: Sequence[Delta]) -> dict[str, Tensor]:
    adapted = {placement.path for placement in plan if placement.kind == LOW_RANK}
    own = [delta for delta in deltas if delta.placement.kind in (BIAS, MODULE)]
    return {name: value for delta in own for name, value in _names(delta, adapted).items()}


def _names(delta: Delta, adapted: set[str]) -> dict[str, Tensor]:
    """PEFT's names of replaced biases and modules, with our live tensors."""
    path = delta.placement.path
    if delta.placement.kind == BIAS:
        return {f"{path}.base_layer.bias" if path in adapted else f"{path}.bias": delta.get_parameter("bias")}
    return {f"{path}.{key.removeprefix('twin.')}": value for key, value in delta.named_parameters()}


def _config(model: nn.Module, record: Attached, config: dict[str, Any]) -> bytes:
    endings = [task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)]
    common = {
        "peft_type": record.method.peft_type,
        "task_type": endings[0] if endings else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": _whole(model, record.plan),
    }
    shortened = {"target_modules": _short(model, config.get("target_modules", []))}
    return (json.dumps(config | common | shortened, indent=2, sort_keys=True) + "\n").encode()


def _whole(model: nn.Module, plan: Plan) -> list[str] | None:
    """The modules trained whole, a container instead of its leaves where all of it is trained."""
    leaves = {placement.path for placement in plan if placement.kind == MODULE}
    roots = set()
    for path in leaves:
        parent = path.rpartition(".")[0]
        below = {p for p, module in modules_of(model) if p.startswith(f"{parent}.") and _has_own(module)}
        roots.add(parent if parent and below <= leaves else path)
    return sorted(roots) or None


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _short(model: nn.Module, paths: list[str]) -> list[str]:
    """The layers' last names where these mean exactly the layers adapted (as vLLM expects), otherwise full paths."""
    tails = {path.rsplit(".", 1)[-1] for path in paths}
    meant = [path for path, _ in modules_of(model) if path.rsplit(".", 1)[-1] in tails]
    return sorted(tails) if set(meant) == set(paths) else sorted(paths)


def _header(model: nn.Module, record: Attached) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "lorakit": VERSION,
        "method": record.method.to_json(),
        "plan": [placement.to_json() for placement in record.plan],
        "base": fingerprint(model, (p.path for p in record.plan if p.kind == LOW_RANK)),
    }


def _with_header(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """safetensors bytes with sorted metadata: the library writes its entries in the order of a hash."""
    metadata = {"format": "pt", "lorakit": json.dumps(header, sort_keys=True, separators=(",", ":"))}
    raw = to_safetensors(dict(tensors), metadata=metadata)
    (size,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + size])
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    active: bool = True,
    any_base: bool = False,
) -> str:
    """Load an adapter that lorakit or PEFT wrote; nothing is attached unless every tensor is right.

    Args:
        model: the base that the adapter was trained on.
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name on this model (default: the folder's).
        trainable: whether its numbers are trained further.
        active: whether to switch to it.
        any_base: skip the comparison with the base it was trained on.

    Returns:
        The adapter's name.

    Raises:
        BadAdapterFile: every fault found: missing, unexpected, misshapen or non-finite tensors, another base, a pickle.
        BadState: the name is taken, or an adapter is merged.
    """
    folder = Path(folder)
    config, header, tensors = read(folder)
    record, tensors = described(model, folder, config, header, tensors, any_base=any_base)
    record.trainable = trainable
    with torch.random.fork_rng(devices=[]):
        deltas = list(new_deltas(model, record.method, record.plan))
    faults = fill(record, [delta for _, delta in deltas], tensors)
    faults += [f"{key} is not part of it" for key in sorted(tensors)]
    if faults:
        raise BadAdapterFile(folder, faults)
    name = name or folder.resolve().name
    put(model, name, record, deltas, active=active)
    return name


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Tensor]]:
    """PEFT's config, our header (None in a file of PEFT's own) and the tensors without prefix.

    Raises:
        BadAdapterFile: no such folder, a pickle, a truncated or newer file, a value that is not finite.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise BadAdapterFile(folder, [_what_is_there(folder)])
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {_bare(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        header = json.loads(metadata["lorakit"]) if "lorakit" in metadata else None
    except (SafetensorError, ValueError, OSError) as error:
        raise BadAdapterFile(folder, [f"it is damaged ({error})"]) from error
    faults = [f"{key} holds values that are not finite" for key, value in tensors.items() if not value.isfinite().all()]
    if header is not None and header.get("format", 0) > FORMAT:
        faults.append(f"it has format {header['format']}, this lorakit reads up to {FORMAT}; install a newer lorakit")
    if header is None and not config:
        faults.append(f"it has no {CONFIG}")
    if faults:
        raise BadAdapterFile(folder, faults)
    return config, header, tensors


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if any(folder.glob("adapter_model.bin")):
        return "its adapter_model.bin is a pickle, which could run code; save it again as safetensors"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{TENSORS}"))
    return f"it holds no {TENSORS}" + (f"; adapters lie in its folders {', '.join(inner)}" if inner else "")


def _bare(key: str) -> str:
    return key.replace("_orig_mod.", "").removeprefix(PREFIX)


def described(
    model: nn.Module,
    folder: Path,
    config: Mapping[str, Any],
    header: Mapping[str, Any] | None,
    tensors: dict[str, Tensor],
    *,
    any_base: bool,
) -> tuple[Attached, dict[str, Tensor]]:
    """The method and plan that the file tells, resolved on this model."""
    if header is None:
        log.warning("%s carries no fingerprint: base not verified", folder)
        tensors, biases = _without_base_copies(model, folder, tensors)
        method, plan = _peft_method(folder, config).from_peft(config, tensors, model)
        known = {(placement.path, placement.kind) for placement in plan}
        return Attached(method, (*plan, *(b for b in biases if (b.path, BIAS) not in known)), trainable=False), tensors
    plan = tuple(Placement.from_json(each) for each in header["plan"])
    paths = {path for path, _ in modules_of(model)}
    faults = [f"this model has no layer {p.path}" for p in plan if p.path not in paths]
    faults += [] if any_base else differences(header.get("base", {}), model)
    if faults:
        raise BadAdapterFile(folder, faults)
    return Attached(Method.from_json(header["method"]), plan, trainable=False), tensors


def _peft_method(folder: Path, config: Mapping[str, Any]) -> type[Method]:
    try:
        return method_of_peft(str(config.get("peft_type")))
    except UnknownName as error:
        raise BadAdapterFile(folder, [str(error)]) from error


def _without_base_copies(
    model: nn.Module, folder: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[Placement]]:
    """Drop copies of the base that PEFT put into the file; a changed bias becomes part of the adapter."""
    own, kept, biases, faults = dict(model.named_parameters()), {}, [], []
    for key, value in tensors.items():
        base = own.get(key.replace(".base_layer.", "."))
        if ".base_layer." not in key or base is None or ".lora_" in key:
            kept[key] = value
        elif key.endswith(".bias"):
            path, kept[key] = key.removesuffix(".base_layer.bias"), value
            biases.append(Placement(path, "bias", BIAS))
        elif base.shape != value.shape or not torch.equal(base.detach().cpu().to(value.dtype), value):
            faults.append(f"{key} is a copy of the base's weight that differs from this model's")
    if faults:
        raise BadAdapterFile(folder, faults)
    return kept, biases


def fill(record: Attached, deltas: Sequence[Delta], tensors: dict[str, Tensor]) -> list[str]:
    """Copy the tensors into the deltas, taking them out of `tensors`; return every fault."""
    faults = record.method.read([delta for delta in deltas if delta.placement.kind == LOW_RANK], tensors)
    adapted = {placement.path for placement in record.plan if placement.kind == LOW_RANK}
    for delta in deltas:
        if delta.placement.kind != LOW_RANK:
            faults += _fill_replaced(_names(delta, adapted), tensors)
    return faults


@torch.no_grad()
def _fill_replaced(names: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    faults = []
    for key, own in names.items():
        value = tensors.pop(key, None)
        if value is None:
            faults.append(f"{key} is missing")
        elif value.shape != own.shape:
            faults.append(f"{key} has shape {tuple(value.shape)}, the model needs {tuple(own.shape)}")
        else:
            own.copy_(value)
    return faults
