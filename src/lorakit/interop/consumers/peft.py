"""PEFT, as its release 0.21.2 behaves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.core.exchange import Update
from lorakit.core.files import CONFIG
from lorakit.core.keys import PREFIX, host
from lorakit.core.patterns import matches, rank_of
from lorakit.core.sites import is_tail
from lorakit.interop.check import Finding, Seen
from lorakit.interop.consumers._rules import (
    RESAVE,
    at,
    converted,
    disguised,
    is_tied,
    judged,
    last,
    matched_scale,
    merged,
    residue,
    said,
    scaled,
    times,
    where,
)

TITLE = "PEFT 0.21.2"
TO = "peft"
KINDS = re.compile(
    "ADALORA|ADAMSS|ADAPTION_PROMPT|BEFT|BOFT|C3A|CARTRIDGE|CPT|DEFT|DELORA|FOURIERFT|FROD|GLORA|GRALORA|HIRA|HRA|IA3|"
    "LILY|LN_TUNING|LOHA|LOKR|LORA|MISS|MULTITASK_PROMPT_TUNING|OFT|OSF|PEANUT|POLY|PREFIX_TUNING|PROMPT_TUNING|PSOFT|"
    "PVERA|P_TUNING|RANDLORA|ROAD|SHADOW|SHIRA|SUPERTUNING|TINYLORA|TRAINABLE_TOKENS|UNILORA|VBLORA|VERA|WAVEFT|XLORA"
)
PATTERNS = ("rank_pattern", "alpha_pattern")
EDITED = ("pissa", "olora", "loftq")  # of init_lora_weights, those that it works out again on loading


def findings(seen: Seen) -> Iterator[Finding]:
    """What PEFT does with an adapter."""
    return judged(seen, RULES, to=TO)


def _kind(seen: Seen) -> Iterator[Finding]:
    kind = seen.exchange.config.get("peft_type")
    if kind is None:
        yield Finding("refuses", f"it needs peft_type, which {CONFIG} lacks", converted(seen, TO))
    elif not KINDS.fullmatch(kind):
        yield Finding("refuses", f"it has no peft_type {kind}, which lorakit loads", merged(seen))


def _names(seen: Seen) -> Iterator[Finding]:
    hidden = disguised(seen, prefix=True)
    named = [key for key in hidden if key.startswith(PREFIX) and ".default." in key]
    what = "it loads nothing under a name that is not base_model.model. and the module's path"
    yield from at("wrong", [key for key in hidden if key not in named], what, converted(seen, TO))
    what = "it loads these as the adapter called default, and nothing as any other"
    yield from at("ignores", named, what, converted(seen, TO))


def _targets(seen: Seen) -> Iterator[Finding]:
    targets = seen.exchange.config.get("target_modules")
    adapted = [each.path for each in seen.exchange.updates if each.form != "experts"]
    missed = [path for path in adapted if targets and not _means(targets, host(path))]
    yield from at("wrong", missed, "it leaves out what target_modules does not mean", converted(seen, TO))
    if adapted and not targets:
        what = "target_modules is not told, so it adapts what is usual for the kind of model, and leaves out the rest"
        yield Finding("ignores", what, converted(seen, TO))


def _means(targets: object, path: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    return isinstance(targets, list) and any(is_tail(path, target) for target in targets)


def _plain(seen: Seen) -> list[Update]:
    """The updates whose rank and alpha are the config's."""
    return [each for each in seen.exchange.updates if each.diagonal is None]


def _ranks(seen: Seen) -> Iterator[Finding]:
    told = seen.exchange.config
    off = [each.path for each in _plain(seen) if (rank_of(told, each.path) or 8) != each.rank]
    return at("refuses", off, "the config gives a rank that is not the tensors' (size mismatch)", converted(seen, TO))


def _scales(seen: Seen) -> Iterator[Finding]:
    told = seen.exchange.config
    return scaled(seen, lambda each: matched_scale(told, each), "it takes the first pattern that matches", to=TO)


def _order(seen: Seen) -> Iterator[Finding]:
    """Of its patterns the first that matches counts, and they are sorted whenever it saves."""
    told = seen.exchange.config
    resorted = dict(told) | {key: dict(sorted((told.get(key) or {}).items())) for key in PATTERNS}
    scales = {each.path: (matched_scale(told, each), matched_scale(resorted, each)) for each in _plain(seen)}
    shares = {path: then / now for path, (now, then) in scales.items() if now}
    moved = {path: share for path, share in shares.items() if share != 1}
    if moved:
        what = f"it sorts the patterns when it saves, and takes the first that matches; saved again, {times(moved)}"
        yield Finding("wrong", what, converted(seen, TO))
    else:
        unclear = [path for path in shares if any(len(_told(told.get(key), path)) > 1 for key in PATTERNS)]
        what = "patterns overlap, and it sorted them when it saved, so which came first in training is lost"
        yield from at("ignores", unclear, what, converted(seen, TO))


def _told(patterns: Mapping[str, Any] | None, path: str) -> set[Any]:
    return {value for key, value in (patterns or {}).items() if matches(key, path)}


def _start(seen: Seen) -> Iterator[Finding]:
    init, start = str(seen.exchange.config.get("init_lora_weights")).lower(), said(seen, "init_lora_weights")
    if init.startswith(EDITED):
        what = f"it works out {start} anew and takes it off the base's weights, for other adapters and unload() too"
        yield Finding("wrong", what, RESAVE)
    elif init.startswith("corda"):
        yield Finding("refuses", f"it wants the statistics of {start} again", RESAVE)
    else:
        yield from residue(seen)


def _unsaid(seen: Seen) -> Iterator[Finding]:
    magnitudes = [each.path for each in seen.exchange.updates if each.magnitude]
    shifts = [each.path for each in seen.exchange.updates if each.shift]
    for key, paths in (("use_dora", magnitudes), ("lora_bias", shifts)):
        if not seen.exchange.config.get(key):
            what = f"{said(seen, key)}, so it leaves out what the file has of it"
            yield from at("wrong", paths, what, converted(seen, TO))


def _absent(seen: Seen) -> Iterator[Finding]:
    saved = seen.exchange.config.get("modules_to_save") or []
    absent = [name for name in saved if not any(_is_in(whole, name) for whole in seen.exchange.whole)]
    what = "it stops with a KeyError at what modules_to_save names and the file lacks"
    return at("refuses", absent, what, f"take it out of modules_to_save in {seen.path / CONFIG}")


def _unsaved(seen: Seen) -> Iterator[Finding]:
    saved = seen.exchange.config.get("modules_to_save") or []
    adapted = [each.path for each in seen.exchange.updates]
    known = (*adapted, "token_adapter")  # which trainable_token_indices tells of
    others = [whole for whole in seen.exchange.whole if not any(_is_in(whole, name) for name in known)]
    untold = [whole for whole in others if not any(f"{name}." in whole for name in saved)]  # "head" means "my_head" too
    if adapted:
        what = "it writes these into the base itself, for other adapters and unload() too"
        yield from at("ignores", [name for name in untold if name.endswith(".bias")], what)
        modules = [name for name in untold if not name.endswith(".bias")]
        yield from at("wrong", modules, f"{what}, as modules_to_save does not name them", converted(seen, TO))


def _is_in(tensor: str, module: str) -> bool:
    return f".{module}." in f".{tensor}"


def _stacked(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if each.form == "experts"]
    if seen.exchange.config.get("lora_dropout"):
        what = f"it refuses {said(seen, 'lora_dropout')} on target_parameters"
        yield from at("refuses", paths, what, f"set lora_dropout to 0.0 in {seen.path / CONFIG}")


def _tied(seen: Seen) -> Iterator[Finding]:
    paths = [each.path for each in seen.exchange.updates if each.form == "embedding" or last(each.path) == "lm_head"]
    if is_tied(seen.exchange.base):
        yield from at("wrong", paths, "the base's head is its embedding, and when it merges, the update goes to both")


def _inner(seen: Seen) -> Iterator[Finding]:
    inner = sorted(path.parent.name for path in seen.path.glob(f"*/{CONFIG}"))
    if inner:
        mend = f"PeftModel.from_pretrained(base, {str(seen.path)!r}, subfolder={inner[0]!r})"
        yield Finding("ignores", f"it reads the folder's own adapter, not those within: {where(inner)}", mend)


RULES = (
    _kind, _names, _targets, _ranks, _scales, _order, _start, _unsaid, _absent, _unsaved, _stacked, _tied, _inner
)  # fmt: skip
