"""vLLM, by the source of its release 0.33.0 (vllm/lora: peft_helper, lora_model, utils, model_manager, layers).

Releases up to 0.26 had no patterns and no trained heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorakit.interop.check import Finding, Seen
from lorakit.interop.consumers._rules import (
    RESAVE,
    at,
    disguised,
    judged,
    lacking,
    matched_scale,
    mended,
    merged,
    no_magnitudes,
    plain_scale,
    residue,
    said,
    scaled,
)

TITLE = "vLLM 0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
RANK = 16  # its default
HEADS = ("classifier", "score")
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of init_lora_weights, those that it takes
UNKNOWN = ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
KEYS = re.compile(
    r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$|(^|\.)(score|classifier)\.(weight|bias)$"
    r"|\.(embed_tokens|lm_head)\.base_layer\.weight$"
)


def findings(seen: Seen) -> Iterator[Finding]:
    """What vLLM does with an adapter."""
    return judged(seen, RULES)


def _fields(seen: Seen) -> Iterator[Finding]:
    return lacking(seen, ("r", "lora_alpha", "target_modules"))


def _ranks(seen: Seen) -> Iterator[Finding]:
    told = seen.exchange.config
    ranks = [told.get("r") or 0, *(told.get("rank_pattern") or {}).values(), *(u.rank for u in seen.exchange.updates)]
    most = max(rank for rank in ranks if isinstance(rank, int))  # AdaLoRA's are masks
    enough = next((rank for rank in RANKS if rank >= most), None)
    if most > RANK:
        what = f"it refuses rank {most}, above the {RANK} of its --max-lora-rank, whose largest choice is {RANKS[-1]}"
        flag = f"vllm serve --enable-lora --max-lora-rank {enough}"
        yield Finding("refuses", what, flag if enough else merged(seen))


def _heads(seen: Seen) -> Iterator[Finding]:
    saved = seen.exchange.config.get("modules_to_save") or []
    refused = [name for name in saved if name not in HEADS] or saved[1:]
    yield from at("refuses", refused, f"it takes one of {' and '.join(HEADS)} in modules_to_save alone", merged(seen))
    if saved and not refused:
        yield Finding("fine", f"it takes the trained {saved[0]} of a classifier; releases up to 0.26 refuse it")


def _biases(seen: Seen) -> Iterator[Finding]:
    if seen.exchange.config.get("bias", "none") != "none":
        yield Finding("refuses", f"it has no trained biases: {said(seen, 'bias')}", mended(seen))


def _others(seen: Seen) -> Iterator[Finding]:
    used = [said(seen, key) for key in UNKNOWN if seen.exchange.config.get(key)]
    return at("refuses", used, "it lacks what the config asks for", mended(seen))


def _start(seen: Seen) -> Iterator[Finding]:
    init = seen.exchange.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in STARTS:
        yield Finding("refuses", f"it refuses {said(seen, 'init_lora_weights')}", RESAVE)
    else:
        yield from residue(seen)


def _names(seen: Seen) -> Iterator[Finding]:
    told = seen.exchange.config
    is_told = told.get("modules_to_save") or told.get("bias", "none") != "none" or told.get("use_dora")
    strange = [] if is_told else [key for key in seen.keys if not KEYS.search(key)]
    hidden = [] if strange else disguised(seen)
    yield from at("refuses", strange, "it cannot tell what a tensor of this name is", mended(seen))
    yield from at("wrong", hidden, "no layer of its own is called so, and it leaves them out", mended(seen))


def _convolutions(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if each.form == "convolution"]
    return at("refuses", paths, "it adapts no convolutions", mended(seen))


def _embeddings(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if each.form == "embedding"]
    return at("fine", paths, "it takes embeddings of some models, and of a vocabulary as large as the base's alone")


def _scales(seen: Seen) -> Iterator[Finding]:
    told = seen.exchange.config
    yield from scaled(seen, lambda each: matched_scale(told, each), "it takes the first pattern that matches")
    if told.get("rank_pattern") or told.get("alpha_pattern"):
        rooted = bool(told.get("use_rslora"))
        older = "0.32 reads rank_pattern and alpha_pattern, 0.26 has one scale for all"
        yield from scaled(seen, lambda _: plain_scale(told, rooted=rooted), older, grade="ignores")


def _experts(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if each.form == "experts"]
    what = "it takes all stacked parameters of its own stacked experts; elsewhere with this flag and is_3d_lora_weight"
    return at("fine", paths, what, "vllm serve --enable-lora --enable-mixed-moe-lora-format")


RULES = (
    _fields, _ranks, _heads, _biases, no_magnitudes, _others, _start, _names, _convolutions, _embeddings, _scales,
    _experts,
)  # fmt: skip
