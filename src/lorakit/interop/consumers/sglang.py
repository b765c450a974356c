"""SGLang, by the source of its release 0.5.23 (sglang/srt/lora: lora_config, lora, lora_manager, mem_pool, utils)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorakit.interop.check import Finding, Seen
from lorakit.interop.consumers._rules import (
    at,
    judged,
    lacking,
    last,
    mended,
    merged,
    no_magnitudes,
    plain_scale,
    residue,
    said,
    scaled,
)

TITLE = "SGLang 0.5.23"
EVERY = ("all", "all-linear")  # the only texts that it takes for target_modules
BESIDE = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)}
WHOLE = ("embed_tokens", "lm_head")  # what it adapts outside of numbered layers
NUMBERED = re.compile(r"layers\.\d+\.")  # how it finds a layer's number


def findings(seen: Seen) -> Iterator[Finding]:
    """What SGLang does with an adapter."""
    return judged(seen, RULES)


def _fields(seen: Seen) -> Iterator[Finding]:
    yield from lacking(seen, ("peft_type", "r", "lora_alpha", "target_modules"))
    kind = seen.exchange.config.get("peft_type", "LORA")
    if kind != "LORA":
        yield Finding("refuses", f"it serves peft_type LORA, not {kind}", mended(seen))


def _targets(seen: Seen) -> Iterator[Finding]:
    targets = seen.exchange.config.get("target_modules", [])
    if not isinstance(targets, list) and targets not in EVERY:
        told = said(seen, "target_modules")
        yield Finding("refuses", f"it takes a list in target_modules, or {' or '.join(EVERY)}: {told}", mended(seen))


def _ranks(seen: Seen) -> Iterator[Finding]:
    rank = seen.exchange.config.get("r")
    off = [each.path for each in seen.exchange.updates if each.rank != rank and each.form != "experts"]
    return at("refuses", off, f"it has room for r={rank} in every layer, and another rank stands in", mended(seen))


def _scales(seen: Seen) -> Iterator[Finding]:
    told = seen.exchange.config
    ignored = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if told.get(key)]
    beside = f" whatever {', '.join(ignored)} say" if ignored else ""
    how = f"it scales all by lora_alpha / r = {plain_scale(told):.4g}{beside}"
    return scaled(seen, lambda _: plain_scale(told), how)


def _fused(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates]
    alone = [path for path in paths if not {*_beside(path)} <= {*paths}]
    what = "it joins q, k and v, and gate and up, and wants q_proj with v_proj, and gate_proj with up_proj; not so here"
    return at("refuses", alone, what, merged(seen))


def _beside(path: str) -> Iterator[str]:
    yield from (path.removesuffix(last(path)) + name for name in BESIDE.get(last(path), ()))


def _experts(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if each.form == "experts"]
    return at("refuses", paths, "it takes experts one by one, not stacked as target_parameters", merged(seen))


def _outside(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if not NUMBERED.search(f"{each.path}.")]
    lost = [path for path in paths if not any(name in path for name in WHOLE)]
    what = f"it leaves out what has neither layers.N. nor {' or '.join(WHOLE)} in its name"
    return at("wrong", lost, what, merged(seen))


def _trained(seen: Seen) -> Iterator[Finding]:
    inside = [name for name in seen.exchange.whole if NUMBERED.search(name)]
    biases = [name for name in inside if name.endswith(".bias")]
    biases += [each.path for each in seen.exchange.updates if each.shift]
    outside = [name for name in seen.exchange.whole if name not in inside]
    modules = [name for name in inside if name not in biases]
    yield from at("wrong", biases, "it takes trained biases for B, or leaves them out", merged(seen))
    yield from at("wrong", outside, "it leaves out what was trained whole", merged(seen))
    yield from at("refuses", modules, "it cannot tell what a tensor of this name is", merged(seen))


RULES = (_fields, _targets, no_magnitudes, _ranks, _scales, _fused, _experts, _outside, _trained, residue)
