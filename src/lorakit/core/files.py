"""Save and load adapters: a PEFT folder, with what PEFT has no words for in the safetensors header.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT, vLLM and others read. The header's `lorakit` entry
holds format version, method, plan and the base's fingerprint. Writes are atomic and byte-deterministic.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakit.core.atomic import write_files
from lorakit.core.attach import new_deltas, put
from lorakit.core.checked import misfits
from lorakit.core.delta import Delta
from lorakit.core.fingerprint import differences
from lorakit.core.header import header_faults, header_of, with_header
from lorakit.core.keys import PREFIX, ROOT, bare
from lorakit.core.method import Method, method_of_peft
from lorakit.core.named import fill
from lorakit.core.patterns import parsed_config
from lorakit.core.pickles import read_pickle
from lorakit.core.plan import BIAS, MODULE, Placement, Plan, misplaced
from lorakit.core.renamed import renamed
from lorakit.core.sites import modules_of
from lorakit.core.state import Attached, attached_to, deltas_of, idle, own_deltas_of
from lorakit.errors import BadAdapterFile, LorakitError, NeverActed

BaseTensor = Callable[[str], Tensor | None]  # a name -> the base's tensor of that name, if there is one

log = logging.getLogger("lorakit")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # what PEFT wrote before safetensors
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
    config, tensors = record.method.to_peft(own_deltas_of(model, name))
    tensors |= _replaced(record.plan, deltas)
    root = ROOT if any(_is_prompt(name) for name in tensors) else PREFIX
    tensors = {_key(model, name, root): _written(name, value) for name, value in tensors.items()}
    files = {TENSORS: with_header(tensors, header_of(model, record)), CONFIG: _config(model, record, config)}
    write_files(Path(folder), files)


def _key(model: nn.Module, name: str, root: str) -> str:
    """PEFT's name in the file; one of PEFT's own that belongs to no layer (what all share) stays as it is."""
    is_shared = name.startswith(ROOT) and ROOT.rstrip(".") not in model._modules
    return name if is_shared or _is_prompt(name) else root + name


def _is_prompt(name: str) -> bool:
    """Whether a tensor belongs to no module: PEFT keeps it beside the model, whose own names then begin with ROOT."""
    return "." not in name


def _written(key: str, value: Tensor) -> Tensor:
    if value.is_meta or value.numel() == 0:
        raise LorakitError(f"{key} has no values here (meta device, or sharded away), so the adapter cannot be saved")
    return value.detach().cpu().contiguous()


def _replaced(plan: Plan, deltas: Sequence[Delta]) -> dict[str, Tensor]:
    adapted = {placement.path for placement in plan if not placement.is_replaced}
    own = [delta for delta in deltas if delta.placement.is_replaced]
    return {name: value for delta in own for name, value in _names(delta, adapted).items()}


def _names(delta: Delta, adapted: set[str]) -> dict[str, Tensor]:
    """PEFT's names of replaced biases and modules, with our live tensors."""
    path = delta.placement.path
    if delta.placement.kind == BIAS:
        return {_bias_name(path, adapted): delta.get_parameter("bias")}
    return {f"{path}.{key.removeprefix('twin.')}": value for key, value in delta.named_parameters()}


def _bias_name(path: str, adapted: set[str]) -> str:
    return f"{path}.base_layer.bias" if path in adapted else f"{path}.bias"


def task_of(model: nn.Module) -> str | None:
    """PEFT's word for what a model does; None where the model's class does not tell."""
    return next((task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)), None)


def _config(model: nn.Module, record: Attached, config: dict[str, Any]) -> bytes:
    common = {
        "peft_type": config.get("peft_type") or record.method.peft_type or record.method.name.upper().replace("-", "_"),
        "task_type": task_of(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": _whole(model, record.plan),
    }
    targets = config.get("target_modules")
    shortened = {} if targets is None else {"target_modules": _short(model, targets)}
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
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors` (or PEFT's older `.bin`).
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
    record, deltas = fitted(model, folder, read(folder), any_base=any_base)
    record.trainable = trainable
    name = name or folder.resolve().name
    put(model, name, record, deltas, active=active)
    return name


class Contents(NamedTuple):
    """What an adapter folder holds; the header is None in a folder of PEFT's own, the tensors lack PEFT's prefix."""

    config: dict[str, Any]
    header: dict[str, Any] | None
    tensors: dict[str, Tensor]


def read(folder: Path) -> Contents:
    """Read a folder; what it says is sound, but not yet compared with any model.

    Raises:
        BadAdapterFile: no such folder, a pickle of more than tensors, a truncated or newer file, a header that makes no
            sense, a value that is not finite.
    """
    if not any((folder / name).is_file() for name in (TENSORS, PICKLE)):
        raise BadAdapterFile(folder, [_what_is_there(folder)])
    try:
        stored, metadata = _stored(folder)
        tensors = {bare(key): value for key, value in stored.items()}
        config = parsed_config((folder / CONFIG).read_text("utf-8")) if (folder / CONFIG).is_file() else {}
        header = json.loads(metadata["lorakit"]) if "lorakit" in metadata else None
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise BadAdapterFile(folder, [f"it is damaged ({error})"]) from error
    faults = [f"{key} holds values that are not finite real numbers" for key, v in tensors.items() if not _is_real(v)]
    faults += misfits(config, {}, f"its {CONFIG}")
    faults += [] if "lorakit" not in metadata else header_faults(header)
    if len(tensors) < len(stored):
        faults.append("it names a tensor twice, with and without PEFT's prefix")
    if "lorakit" not in metadata and not config:
        faults.append(f"it has no {CONFIG}")
    if faults:
        raise BadAdapterFile(folder, faults)
    return Contents(config, header, tensors)


def _stored(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as they are named in the file, and the metadata beside them."""
    if not (folder / TENSORS).is_file():
        return {key: value.read() for key, value in read_pickle(folder / PICKLE).items()}, {}
    with safe_open(folder / TENSORS, framework="pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}


def _what_is_there(folder: Path) -> str:
    if folder.is_file():
        return "it is a file; `lorakit convert` makes a folder of it"
    if not folder.is_dir():
        return "there is no such folder"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{TENSORS}"))
    return f"it holds no {TENSORS}" + (f"; adapters lie in its folders {', '.join(inner)}" if inner else "")


def _is_real(value: Tensor) -> bool:
    """Whether every number stays finite as the float32 that it becomes (which 8-bit floats need to be compared)."""
    return not value.is_complex() and bool(value.float().isfinite().all())


def fitted(
    model: nn.Module,
    folder: Path,
    found: Contents,
    *,
    any_base: bool,
    base: BaseTensor | None = None,
    device: str | None = None,
) -> tuple[Attached, list[tuple[nn.Module, Delta]]]:
    """The adapter of a folder, resolved on this model: its record, and its deltas with their values, not attached.

    Args:
        model: the base, or its skeleton on the meta device.
        folder: where the adapter was found, for messages.
        found: what `read` gave.
        any_base: skip the comparison with the base it was trained on.
        base: where the base's tensors are, if not in `model`.
        device: where the deltas go, if not to their layers'.

    Raises:
        BadAdapterFile: every fault found.
    """
    with _blamed_on(folder):
        if found.header is None:
            record, tensors = _of_peft(model, folder, found, base or _own_tensors(model).get)
        else:
            record, tensors = _of_header(model, folder, found.header, any_base=any_base), dict(found.tensors)
        return record, _filled(model, folder, record, tensors, device)


@contextmanager
def _blamed_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except BadAdapterFile:
        raise
    except LorakitError as error:
        raise BadAdapterFile(folder, [str(error)]) from error


def _of_header(model: nn.Module, folder: Path, header: Mapping[str, Any], *, any_base: bool) -> Attached:
    plan = tuple(Placement.from_json(each) for each in header["plan"])
    faults = misplaced(plan, model) + ([] if any_base else differences(header["base"], model))
    if faults:
        raise BadAdapterFile(folder, faults)
    return Attached(Method.from_json(header["method"]), plan, trainable=False)


def _of_peft(model: nn.Module, folder: Path, found: Contents, base: BaseTensor) -> tuple[Attached, dict[str, Tensor]]:
    log.warning("%s carries no fingerprint: base not verified", folder)
    kind, tensors = method_of_peft(found.config), renamed(found.tensors, model)
    method, plan = kind.from_peft(found.config, tensors, model)
    kept, biases = _without_base_copies(plan, folder, tensors, base)
    return Attached(method, (*plan, *biases), trainable=False), kept


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if not value.is_meta}


def _without_base_copies(
    plan: Plan, folder: Path, tensors: Mapping[str, Tensor], base: BaseTensor
) -> tuple[dict[str, Tensor], list[Placement]]:
    """Drop copies of base tensors that are not the plan's; a changed bias becomes part of the adapter."""
    planned, adapted = {(p.path, p.kind) for p in plan}, {p.path for p in plan if not p.is_replaced}
    kept, biases, faults = {}, [], []
    for key, value in tensors.items():
        path, _, parameter = key.replace(".base_layer.", ".").rpartition(".")
        ours = {(path, MODULE), (path, BIAS)} if parameter == "bias" else {(path, MODULE)}
        theirs = None if ours & planned else base(f"{path}.{parameter}")
        if theirs is None:
            kept[key] = value
        elif theirs.shape != value.shape:
            shapes = f"has shape {tuple(value.shape)}, this model's {tuple(theirs.shape)}"
            faults.append(f"{key} is a copy of the base's {parameter}, but {shapes}")
        elif torch.equal(theirs.detach().cpu().to(value.dtype).float(), value.float()):
            continue
        elif parameter == "bias":
            kept[_bias_name(path, adapted)] = value
            biases.append(Placement(path, "bias", BIAS))
        else:
            faults.append(f"{key} is a copy of the base's {parameter} that differs from this model's")
    if faults:
        raise BadAdapterFile(folder, faults)
    return kept, biases


def _filled(
    model: nn.Module, folder: Path, record: Attached, tensors: dict[str, Tensor], device: str | None
) -> list[tuple[nn.Module, Delta]]:
    """Build the deltas with the values of `tensors`; the method's own take no memory before their shapes are right."""
    own = tuple(each for each in record.plan if not each.is_replaced)
    rest = tuple(each for each in record.plan if each.is_replaced)
    left = dict(tensors)
    with torch.device("meta"):
        trial = [delta for _, delta in new_deltas(model, record.method, own, record.plan)]
    faults = record.method.read(trial, left)
    replaced = _built(model, record.method, rest, rest, device)
    for _, delta in replaced:
        faults += fill(_names(delta, {each.path for each in own}), left)
    faults += [f"{key} is not part of it" for key in sorted(left)]
    if faults:
        raise BadAdapterFile(folder, faults)
    deltas = _built(model, record.method, own, record.plan, device)
    record.method.read([delta for _, delta in deltas], tensors)
    order = {(each.path, each.slot): number for number, each in enumerate(record.plan)}
    return sorted(deltas + replaced, key=lambda pair: order[pair[1].placement.path, pair[1].placement.slot])


def _built(
    model: nn.Module, method: Method, plan: Plan, whole: Plan, device: str | None
) -> list[tuple[nn.Module, Delta]]:
    deltas = new_deltas(model, method, plan, whole)
    return [(module, _with_room(delta, device) if device else delta) for module, delta in deltas]


def _with_room(delta: Delta, device: str) -> Delta:
    """The delta on a device; one that was built from a skeleton gets memory for its values."""
    bare = any(parameter.is_meta for parameter in delta.parameters())
    return delta.to_empty(device=device) if bare else delta.to(device)
