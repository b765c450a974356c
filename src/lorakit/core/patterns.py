"""What PEFT says of single layers: ranks and alphas by patterns on paths, of which the first that matches counts."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
log = logging.getLogger("lorakit")
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")  # of PEFT's initialisations
BEYOND = {  # of PEFT's fields, those by which an update is more than scale · B A of the layer that it names
    "alora_invocation_tokens": "activated LoRA, which acts only after certain tokens",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layers that PEFT makes out of the base's",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
}
UNLOADED = {  # those that are converted, but neither loaded nor merged
    "lora_bias": "a bias on lora_B",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
}


def parsed_config(text: str) -> Any:
    """A config's JSON; old files tell booleans as texts.

    >>> parsed_config('{"fan_in_fan_out": "true", "r": 8}')
    {'fan_in_fan_out': True, 'r': 8}
    """
    told = json.loads(text)
    if not isinstance(told, dict):
        return told
    return {key: _BOOLEANS.get(value, value) if isinstance(value, str) else value for key, value in told.items()}


def pattern_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Patterns that are no regular expressions."""
    targets = config.get("target_modules")
    keys = [targets] if isinstance(targets, str) else []
    for key in [*keys, *(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"its pattern {key!r} cannot be read ({error})"


def residual(config: Mapping[str, Any]) -> list[str]:
    """The fault of a file whose numbers belong to a base that PEFT changes when it loads them."""
    init = config.get("init_lora_weights")
    if not isinstance(init, str) or not init.lower().startswith(_RESIDUAL):  # PEFT takes "OLoRA" too
        return []
    return [
        f"its numbers began as {init} and belong to a base from which PEFT subtracts their start; save it again with "
        "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    ]


def beyond(config: Mapping[str, Any]) -> Iterator[str]:
    """The faults of a file whose updates are more than what only PEFT's own folders can say.

    >>> list(beyond({"use_qalora": True, "use_bdlora": None}))
    ["it uses QA-LoRA (use_qalora), for which only PEFT's own folders have words"]
    """
    used = {key: words for key, words in BEYOND.items() if config.get(key)}
    yield from (f"it uses {words} ({key}), for which only PEFT's own folders have words" for key, words in used.items())


def rank_of(config: Mapping[str, Any], path: str) -> Any:
    """The rank that a config tells for one layer; None where it tells none."""
    patterns = config.get("rank_pattern") or {}
    return next((rank for key, rank in patterns.items() if matches(key, path)), config.get("r"))


def alpha_of(config: Mapping[str, Any], path: str, rank: int, faults: list[str], key: str = "lora_alpha") -> float:
    """The alpha of one layer: PEFT takes the first matching pattern, after sorting them on save.

    The sorting loses the author's order, so the rank that a pattern gives is checked against the tensor: where the
    first match is wrong, the matching pattern of the right rank is the author's, for alpha too.
    """
    rank_patterns, alpha_patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    matched = [pattern for pattern in rank_patterns if matches(pattern, path)]
    default = float(8 if config.get(key) is None else config[key])  # 8 is PEFT's own default
    first = next((float(a) for pattern, a in alpha_patterns.items() if matches(pattern, path)), default)
    expected = rank_patterns[matched[0]] if matched else config.get("r", rank)
    if expected == rank:
        return first
    fitting = [pattern for pattern in matched if rank_patterns[pattern] == rank]
    if not fitting:
        faults.append(f"{path} has rank {rank}, but the config says {expected}")
        return first
    log.warning("rank_pattern of %s was reordered by PEFT; rank %d of its tensors decides", path, rank)
    return float(alpha_patterns.get(fitting[0], first))


def matches(key: str, path: str) -> bool:
    """Whether a pattern of PEFT's means a layer."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def commonest(values: Any, default: Any) -> Any:
    """The value that stands most often."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def plain(number: float) -> float | int:
    """A whole number as an integer, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def fields_of(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a config that give each path its rank and alpha, in one way only.

    `r` and `lora_alpha` are the commonest values, and every other layer has a pattern of its own that is its escaped
    full path, so the order of patterns cannot matter.

    >>> fields_of({"h.0.q": 2, "h.1.q": 2, "h.1.v": 4}, {"h.0.q": 8.0, "h.1.q": 8.0, "h.1.v": 8.0})
    {'r': 2, 'lora_alpha': 8, 'rank_pattern': {'h\\\\.1\\\\.v': 4}, 'alpha_pattern': {}}
    """
    rank, alpha = commonest(ranks.values(), 8), commonest(alphas.values(), 16.0)
    return {
        "r": rank,
        "lora_alpha": plain(alpha),
        "rank_pattern": {_pattern(path, ranks): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(path, ranks): plain(a) for path, a in alphas.items() if a != alpha},
    }


def _pattern(path: str, paths: Iterable[str]) -> str:
    """A pattern that means this path alone: PEFT's also mean every longer path that ends so.

    >>> print(_pattern("out", ["out", "x.out"]), _pattern("x.out", ["out", "x.out"]))
    ^out x\\.out
    """
    is_tail = any(other.endswith(f".{path}") for other in paths)
    return f"^{re.escape(path)}" if is_tail else re.escape(path)
