"""What the rules of several programs have in common: how findings are worded, and which command mends them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.core.exchange import Update
from lorakit.core.files import CONFIG
from lorakit.core.keys import PREFIX, bare
from lorakit.core.method import Method
from lorakit.core.patterns import UNLOADED, beyond, matches, plain, rank_of, residual
from lorakit.interop.check import Finding, Grade, Seen

Rule = Callable[[Seen], Iterator[Finding]]
FOLDERS = ("peft", "portable")  # the formats that are PEFT folders
PORTABLE, GGUF = "portable", "gguf"
RESAVE = "in PEFT: model.save_pretrained(OUT, path_initial_model_for_weight_conversion=START)"


def judged(seen: Seen, rules: Sequence[Rule], *, to: str = PORTABLE) -> Iterator[Finding]:
    """What the rules of a program that reads PEFT folders find; on any other format there is but one finding."""
    if seen.exchange.format not in FOLDERS:
        yield Finding("refuses", f"it reads PEFT folders, not the format {seen.exchange.format}", converted(seen, to))
    elif not seen.exchange.config:
        yield Finding("refuses", f"it needs {CONFIG}, which the folder lacks", converted(seen, to))
    else:
        yield from (found for rule in rules for found in rule(seen))


def at(grade: Grade, names: Sequence[str], what: str, mend: str = "") -> Iterator[Finding]:
    """A finding about these layers or tensors, if there are any."""
    if names:
        yield Finding(grade, f"{what}: {where(names)}", mend)


def where(names: Sequence[str]) -> str:
    """The first name, and how many more there are.

    >>> where(["h.0.q", "h.1.q", "h.2.q"])
    'h.0.q and 2 more'
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def converted(seen: Seen, to: str = PORTABLE) -> str:
    """The command that writes the adapter in another format."""
    out = f"{seen.place}-{to}" if to != GGUF else f"{seen.place}.gguf"
    words = ["lorakit", "convert", str(seen.path), "-o", out, "--to", to]
    words += [] if seen.alpha is None else ["--alpha", str(plain(seen.alpha))]
    return shlex.join(words + (["--base", seen.exchange.base or "BASE"] if to == GGUF else []))


def merged(seen: Seen) -> str:
    """The command that folds the adapter into its base; "" where it has no place in the base's weights, or cannot."""
    header, config = seen.exchange.header, seen.exchange.config
    if any(map(config.get, UNLOADED)) or any(beyond(config)):
        return ""
    if header and "merge" in Method.from_json(header["method"]).waives:
        return ""
    return shlex.join(["lorakit", "merge", str(seen.path), "--out", f"{seen.place}-merged"])


def mended(seen: Seen, to: str = PORTABLE) -> str:
    """A conversion where the adapter is nothing but B A of matrices, otherwise the merge."""
    simple = [not (u.magnitude or u.shift) and u.form in ("linear", "embedding") for u in seen.exchange.updates]
    return converted(seen, to) if simple and all(simple) and not seen.exchange.whole else merged(seen)


def lacking(seen: Seen, needed: Sequence[str], *, to: str = PORTABLE) -> Iterator[Finding]:
    """Fields of the config that it cannot do without."""
    absent = [key for key in needed if key not in seen.exchange.config]
    if absent:
        yield Finding("refuses", f"it needs {', '.join(absent)}, which {CONFIG} lacks", mended(seen, to))


def said(seen: Seen, key: str) -> str:
    """A field of the config as it stands there."""
    return f"{key}={seen.exchange.config.get(key)!r}"


def no_magnitudes(seen: Seen) -> Iterator[Finding]:
    """It has no DoRA."""
    paths = [each.path for each in seen.exchange.updates if each.magnitude]
    told = ["its config"] if seen.exchange.config.get("use_dora") else []
    return at("refuses", paths or told, "it has no DoRA", mended(seen))


def residue(seen: Seen) -> Iterator[Finding]:
    """Numbers that belong to a base without what they began as, added to the base as it is."""
    if residual(seen.exchange.config):
        start = said(seen, "init_lora_weights")
        yield Finding("wrong", f"it adds B A to the base as it is, though {start} took its start off the base", RESAVE)


def scaled(
    seen: Seen, told: Callable[[Update], float], how: str, *, grade: Grade = "wrong", to: str = PORTABLE
) -> Iterator[Finding]:
    """Updates that it multiplies by another number than they were trained with."""
    own = [each for each in seen.exchange.updates if each.scale and each.diagonal is None]
    shares = {each.path: told(each) / each.scale for each in own}
    off = {path: share for path, share in shares.items() if not math.isclose(share, 1, rel_tol=1e-4)}
    if off:
        yield Finding(grade, f"{how}: {times(off)}", mended(seen, to))


def times(shares: Mapping[str, float]) -> str:
    """Which layers get how much of their update.

    >>> times({"h.0.q": 0.5, "h.1.q": 0.5}), times({"h.0.q": 4.0, "h.1.q": 0.5})
    ('0.5 times the trained update in h.0.q and 1 more', '0.5 to 4 times the trained update in h.0.q and 1 more')
    """
    low, high = min(shares.values()), max(shares.values())
    span = f"{low:.4g}" if math.isclose(low, high, rel_tol=1e-4) else f"{low:.4g} to {high:.4g}"
    return f"{span} times the trained update in {where(list(shares))}"


def plain_scale(config: Mapping[str, Any], *, rooted: bool = False) -> float:
    """lora_alpha / r or lora_alpha / sqrt(r), with PEFT's defaults."""
    alpha, rank = config.get("lora_alpha"), config.get("r") or 8
    return float(8 if alpha is None else alpha) / (math.sqrt(rank) if rooted else rank)


def matched_scale(config: Mapping[str, Any], update: Update) -> float:
    """The scale by PEFT's rule: of rank_pattern and of alpha_pattern, the first that matches."""
    alphas = config.get("alpha_pattern") or {}
    alpha = next((alpha for key, alpha in alphas.items() if matches(key, update.path)), config.get("lora_alpha"))
    told = {"r": rank_of(config, update.path), "lora_alpha": alpha}
    return plain_scale(told, rooted=bool(config.get("use_rslora")))


def disguised(seen: Seen, *, prefix: bool = False) -> list[str]:
    """Names with something of a wrapper around the module's path, or, where it is needed, without PEFT's prefix."""
    named = [key for key in seen.keys if "." in bare(key)]
    return [key for key in named if _path(key, prefix=prefix) != bare(key).removesuffix(".weight")]


def _path(key: str, *, prefix: bool) -> str:
    return "" if prefix and not key.startswith(PREFIX) else key.removeprefix(PREFIX).removesuffix(".weight")


def is_tied(base: str | None) -> bool | None:
    """Whether a base's head is its embedding; None where its config is not at hand."""
    try:
        return bool(json.loads((Path(base or "") / "config.json").read_bytes())["tie_word_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last(path: str) -> str:
    """The last name of a path."""
    return path.rpartition(".")[2]
