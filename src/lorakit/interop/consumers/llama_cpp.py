"""llama.cpp, by its convert_lora_to_gguf.py at commit 0b03ada and src/llama-adapter.cpp at commit 0650ea8.

It reads GGUF alone, so of a PEFT folder this says what its own script makes. Where that is wrong, lorakit writes the
GGUF file.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorakit.core.exchange import Update
from lorakit.interop.check import Finding, Seen
from lorakit.interop.consumers._rules import (
    GGUF,
    at,
    is_tied,
    judged,
    lacking,
    last,
    mended,
    merged,
    residue,
    scaled,
)

TITLE = "llama.cpp (convert_lora_to_gguf.py at commit 0b03ada)"
PAIRS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
SKIPPED = ".base_layer.weight"
NORMS = ("_layernorm", ".norm")


def findings(seen: Seen) -> Iterator[Finding]:
    """What llama.cpp does with an adapter."""
    return iter(()) if seen.exchange.format == GGUF else judged(seen, RULES, to=GGUF)


def _fields(seen: Seen) -> Iterator[Finding]:
    yield from lacking(seen, ("lora_alpha",), to=GGUF)
    if not seen.exchange.config.get("base_model_name_or_path"):
        yield Finding("refuses", "it needs base_model_name_or_path, or --base", mended(seen, GGUF))


def _scales(seen: Seen) -> Iterator[Finding]:
    alpha = float(seen.exchange.config.get("lora_alpha") or 0)

    def told(update: Update) -> float:
        return alpha / update.rank if alpha else 1.0  # an alpha of 0 is none to it

    return scaled(seen, told, f"it scales each layer by lora_alpha = {alpha:g} over the layer's own rank", to=GGUF)


def _names(seen: Seen) -> Iterator[Finding]:
    others = [key for key in seen.keys if SKIPPED not in key and not any(end in key for end in PAIRS)]
    norms = [key for key in others if any(part in key for part in NORMS)]
    rest = [key for key in others if key not in norms]
    yield from at("refuses", rest, "it stops at what is neither A nor B", mended(seen, GGUF))
    yield from at("wrong", norms, "it writes trained norms, which llama.cpp then leaves out", merged(seen))


def _layouts(seen: Seen) -> Iterator[Finding]:
    turned = [each.path for each in seen.exchange.updates if seen.exchange.config.get("fan_in_fan_out")]
    what = "it turns A and B around as it turns the weights of Conv1D, though they stand as those of Linear do"
    yield from at("refuses", turned, what, mended(seen, GGUF))
    odd = [each.path for each in seen.exchange.updates if each.form in ("convolution", "experts")]
    yield from at("refuses", odd, "it has no place for convolutions and stacked experts", merged(seen))


def _heads(seen: Seen) -> Iterator[Finding]:
    heads = [each.path for each in seen.exchange.updates if last(each.path) == "lm_head"]
    tied = is_tied(seen.exchange.base)
    if tied:
        yield from at("refuses", heads, "it takes no head that is the base's embedding, as here", merged(seen))
    elif tied is None:
        yield from at("fine", heads, "it takes the head unless it is the base's embedding too, as in many small bases")


RULES = (_fields, _scales, _names, _layouts, _heads, residue)
