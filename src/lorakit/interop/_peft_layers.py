"""The updates of a PEFT folder out of its tensors, and back: names, shapes, ranks and alphas.

Stacked experts are PEFT's `target_parameters`: it wraps a module once for each of its parameters, the first innermost,
and names the tensors by the wrapper; A is (E R, in), all rows of one expert together, B (out, R E), all experts of one
rank together.

Legend: E experts, R rank, I in, O out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.core.exchange import Exchange, Form, Part, Update
from lorakit.core.keys import host, wrappers
from lorakit.core.patterns import alpha_of, fields_of, rank_of
from lorakit.core.sites import is_tail, slice_of
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile
from lorakit.interop._fitting import misfit

ENDINGS = {  # of a tensor's name -> what it is of an update; the longer first
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "shift",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_A": "a",
    ".lora_B": "b",
    ".lora_E": "diagonal",
}
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
OTHERS = re.compile(r"lora(_linear_layer)?[._](up|down)\.weight$")  # of kohya's and of diffusers' older names
PRUNED = (".lora_A", ".lora_B", ".lora_E")
LOW_RANK = ("LORA", "ADALORA")
EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")  # in the order in which models have them
DIMENSIONS = (2, 3, 4, 5)  # of A: of a matrix, and of convolutions over one to three
EPSILON = 1e-5  # that AdaLoRA's code adds to a rank
Layer = dict[str, Value]


def read(
    config: Mapping[str, Any], header: Mapping[str, Any] | None, named: Mapping[str, Value]
) -> tuple[tuple[Update, ...], dict[str, Value], list[str]]:
    """The updates, the tensors in place of the base's own, and what is wrong."""
    layers, whole = _sorted_out(config, named)
    faults = [f"{name} is of another format than the rest" for name in whole if layers and OTHERS.search(name)]
    stacked = _stacked(list(layers), config.get("target_parameters") or ())
    found = [_update(name, layer, config, stacked.get(name), faults) for name, layer in layers.items()]
    parts = _parts(header or {})
    updates = tuple(_with_parts(each, parts.get(each.path, [])) for each in found if each is not None)
    return updates, whole, faults


def _sorted_out(config: Mapping[str, Any], named: Mapping[str, Value]) -> tuple[dict[str, Layer], Layer]:
    """The tensors of updates by layer, and those in place of the base's own by their names there."""
    layers: dict[str, Layer] = {}
    whole: Layer = {}
    low_rank = config.get("peft_type", LOW_RANK[0]) in LOW_RANK
    for name, value in named.items():
        end = next((end for end in ENDINGS if name.endswith(end)), None) if low_rank else None
        if end is None or (end in PRUNED and not value.numel):  # AdaLoRA left nothing of the layer
            whole[name.replace(".base_layer.", ".")] = value
        else:
            layer = layers.setdefault(name.removesuffix(end), {})
            layer[ENDINGS[end]] = value
            layer |= {"lookup": value} if "embedding" in end else {}
    return layers, whole


def _stacked(names: Iterable[str], told: Sequence[str]) -> dict[str, str]:
    """PEFT's names of the wrappers around experts, each with its parameter's path.

    >>> _stacked(["h.0.experts.base_layer", "h.0.experts"], ["experts.down_proj", "experts.gate_up_proj"])
    {'h.0.experts.base_layer': 'h.0.experts.gate_up_proj', 'h.0.experts': 'h.0.experts.down_proj'}
    """
    found: dict[str, str] = {}
    for module in dict.fromkeys(re.sub(r"(\.base_layer)+$", "", name) for name in names):
        meant = {target.rpartition(".")[2] for target in told if is_tail(module, target.rpartition(".")[0])}
        whole = [f"{module}.{parameter}" for parameter in _in_order(meant)]
        found |= dict(zip(wrappers(module, len(meant)), whole, strict=True))
    return found


def _in_order(parameters: Collection[str]) -> list[str]:
    """The parameters of a module of experts in its own order, in which PEFT wraps them and which no file tells.

    Raises:
        BadAdapterFile: several, of which one is not known here.
    """
    strange = sorted(set(parameters) - set(EXPERTS))
    if strange and len(parameters) > 1:
        reason = f"only the model tells in which order its experts have {', '.join(sorted(parameters))}"
        raise BadAdapterFile("the PEFT adapter", [f"{reason}; load it with lorakit.load"])
    return sorted(parameters, key=lambda name: EXPERTS.index(name) if name in EXPERTS else 0)


def _update(
    name: str, layer: Layer, config: Mapping[str, Any], stacked: str | None, faults: list[str]
) -> Update | None:
    """One layer's update; None where `faults` got a reason."""
    if found := misfit(layer, (2,) if stacked is not None or "lookup" in layer else DIMENSIONS):
        faults.append(f"{name} {found}")
        return None
    if stacked is not None:
        return _experts(stacked, layer, config, faults)
    a, b, diagonal = layer["a"], layer["b"], layer.get("diagonal")
    rank = a.shape[0]
    return Update(
        path=name,
        a=a,
        b=b,
        alpha=alpha_of(config, name, rank, faults) if diagonal is None else _budgeted(config) * rank,
        rooted=diagonal is None and bool(config.get("use_rslora")),
        form=_form(layer),
        magnitude=layer.get("magnitude"),
        shift=layer.get("shift"),
        diagonal=diagonal,
    )


def _budgeted(config: Mapping[str, Any]) -> float:
    """AdaLoRA's scale: that of the rank it began with, whatever is left of it."""
    start, alpha = config.get("init_r") or 12, config.get("lora_alpha")
    alpha = 8.0 if alpha is None else float(alpha)
    return (alpha if alpha > 0 else start) / (start + EPSILON)


def _form(layer: Layer) -> Form:
    if "lookup" in layer:
        return "embedding"
    return "convolution" if len(layer["a"].shape) > 2 else "linear"


def _experts(path: str, layer: Layer, config: Mapping[str, Any], faults: list[str]) -> Update | None:
    (rows, inner), (out, columns), rank = layer["a"].shape, layer["b"].shape, rank_of(config, path)
    if not isinstance(rank, int) or rank < 1 or rows % rank:
        faults.append(f"{path} has {rows} rows in A and {columns} columns in B for experts of rank {rank}")
        return None
    count = rows // rank
    a = layer["a"].then(lambda t: t.unflatten(0, (count, rank)), (count, rank, inner))
    b = layer["b"].then(lambda t: t.unflatten(1, (rank, count)).permute(2, 0, 1), (count, out, rank))
    return Update(path, a, b, alpha_of(config, path, rank, faults), bool(config.get("use_rslora")), "experts")


def _parts(header: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The slices of fused layers that lorakit's own header tells, by path."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for placement in header.get("plan", ()):
        if placement.get("slice") is not None:
            found.setdefault(placement["path"], []).append(placement)
    return found


def _with_parts(update: Update, told: Sequence[Mapping[str, Any]]) -> Update:
    total = sum(placement["rank"] for placement in told)
    if not total or update.rank % total:
        return update
    times, at, parts = update.rank // total, 0, []  # twice the rank where the update began with B0 A0
    for placement in told:
        where, rank = slice_of(placement["slice"]), times * placement["rank"]
        parts += [] if where is None else [Part(placement["role"], where, at, rank)]
        at += rank
    return replace(update, slices=tuple(parts))


def written(exchange: Exchange) -> tuple[dict[str, Any], dict[str, Value]]:
    """PEFT's config and tensors, without its prefix on names.

    Raises:
        BadAdapterFile: something that PEFT has no words for.
    """
    if not exchange.updates or any(update.diagonal is not None for update in exchange.updates):
        return _as_it_stands(exchange)
    _refuse_mixtures(exchange)
    stacked = [update.path for update in exchange.updates if update.form == "experts"]
    adapted = list(dict.fromkeys(host(update.path) for update in exchange.updates if update.form != "experts"))
    told = exchange.config if "peft_type" in exchange.config else {}  # others' headers say nothing to PEFT
    config = {
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        **told,
        **_scales(exchange.updates),
        "peft_type": "LORA",
        "task_type": exchange.task,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _targets(told.get("target_modules"), adapted),
        "target_parameters": stacked or None,
        "use_dora": any(update.magnitude is not None for update in exchange.updates),
        "lora_bias": any(update.shift is not None for update in exchange.updates),
        **_besides(exchange),
        **({"lora_dropout": 0.0} if stacked else {}),  # which PEFT refuses there
    }
    return config, _tensors(exchange.updates) | _whole(exchange)


def _as_it_stands(exchange: Exchange) -> tuple[dict[str, Any], dict[str, Value]]:
    """What PEFT wrote itself, of any type of adapter."""
    if "peft_type" not in exchange.config:
        raise BadAdapterFile("the adapter", ["it has no low-rank updates that PEFT has words for"])
    tensors = dict(exchange.whole)
    for update in exchange.updates:
        parts = {"lora_A": update.a, "lora_B": update.b, "lora_E": update.diagonal}
        tensors |= {f"{update.path}.{name}": value for name, value in parts.items() if value is not None}
    return dict(exchange.config), tensors


def _refuse_mixtures(exchange: Exchange) -> None:
    told = {"DoRA's magnitude": "magnitude", "a bias of B": "shift"}
    for words, name in told.items():
        some = [update.path for update in exchange.updates if getattr(update, name) is not None]
        if some and len(some) < len(exchange.updates):
            raise BadAdapterFile("the adapter", [f"{some[0]} has {words}, other layers have not; PEFT wants it of all"])


def _scales(updates: Sequence[Update]) -> dict[str, Any]:
    rooted = all(update.rooted for update in updates)
    alphas = {each.path: each.alpha if each.rooted == rooted else each.scale * each.rank for each in updates}
    return fields_of({each.path: each.rank for each in updates}, alphas) | {"use_rslora": rooted}


def _targets(told: Any, adapted: Sequence[str]) -> list[str]:
    """PEFT's own short names where they mean the layers of the file, otherwise full paths."""
    short = told if isinstance(told, list) else []
    meant = all(any(is_tail(path, target) for target in short) for path in adapted)
    return sorted(short if short and meant else adapted)


def _besides(exchange: Exchange) -> dict[str, Any]:
    """How trained biases and modules are told of."""
    own = {update.path for update in exchange.updates}
    parents = {name.rpartition(".")[0] for name in exchange.whole if not name.endswith(".bias")}
    biases = {name.rpartition(".")[0] for name in exchange.whole if name.endswith(".bias")} - parents
    usual = "none" if not biases else "lora_only" if biases <= own else "all"
    saved = sorted(path for path in parents - own if "token_adapter" not in path)
    told = exchange.config.get("modules_to_save") or saved
    there = [name for name in told if any(f".{name}." in f".{key}" for key in exchange.whole)]
    return {"bias": exchange.config.get("bias") or usual, "modules_to_save": there or None}


def _tensors(updates: Sequence[Update]) -> dict[str, Value]:
    experts: dict[str, list[Update]] = {}
    found: dict[str, Value] = {}
    for update in updates:
        if update.form == "experts":
            experts.setdefault(update.path.rpartition(".")[0], []).append(update)
        else:
            a, b = EMBEDDING if update.form == "embedding" else LINEAR
            parts = {a: update.a, b: update.b, ".lora_magnitude_vector": update.magnitude, ".lora_B.bias": update.shift}
            found |= {update.path + end: value for end, value in parts.items() if value is not None}
    for module, own in experts.items():
        named = {update.path.rpartition(".")[2]: update for update in own}
        for name, parameter in zip(wrappers(module, len(own)), _in_order(named), strict=True):
            found |= _flat(name, named[parameter])
    return found


def _flat(name: str, update: Update) -> dict[str, Value]:
    (count, rank, inner), out = update.a.shape, update.b.shape[1]
    a = update.a.then(lambda tensor: tensor.flatten(0, 1), (count * rank, inner))
    b = update.b.then(lambda tensor: tensor.permute(1, 2, 0).flatten(1), (out, rank * count))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _whole(exchange: Exchange) -> dict[str, Value]:
    own = {update.path for update in exchange.updates}

    def name(key: str) -> str:
        path, _, tail = key.rpartition(".")
        return f"{path}.base_layer.{tail}" if path in own and tail in ("weight", "bias") else key

    return {name(key): value for key, value in exchange.whole.items()}
