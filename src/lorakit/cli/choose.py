"""Choose which weights to adapt within a budget of trained numbers."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorakit.cli._show import program, say, table
from lorakit.core.atomic import write_files
from lorakit.core.choose import Choice
from lorakit.errors import OutputExists
from lorakit.reproduce.choosing import Question, answer, fields_of
from lorakit.train import Train

SCORES = {"gradient": "gradient energy", "variance": "explained variance", "nfn": "normalised feature norm"}


@dataclass(frozen=True, kw_only=True)
class Options(Question):
    """A question, and where its answer goes."""

    out: str | None = None  # a TOML file that `lorakit train --config` reads


def main(options: Options) -> None:
    """Print the chosen sites and ranks, and how to train with them.

    Raises:
        OutputExists: `out` is there already; nothing was asked.
    """
    out = Path(options.out) if options.out else None
    if out is not None:
        _refuse_present(out)
    question = Question(**{field.name: getattr(options, field.name) for field in fields(Question)})
    choices = answer(question)
    spent = sum(choice.numbers for choice in choices)
    rows = [[c.site.path, c.site.role, c.rank, c.numbers, f"{c.score:.4g}"] for c in choices]
    columns = ["layer", "role", "rank", "numbers", SCORES[question.by]]
    table(f"{len(choices)} sites for {spent:,} of {question.budget:,} trained numbers", columns, rows, texts=2)
    table("By role", ["role", "sites", "ranks together", "numbers"], _by_role(choices))
    if out is not None:
        write_files(out.parent, {out.name: _toml(question, choices).encode()})
        say(f"Written to {out}. Train with it:")
    else:
        say("Nothing is written. Ask again with --out chosen.toml, and train with it:")
    say(f"  {program()} train --config {shlex.quote(str(out or 'chosen.toml'))} --out out/chosen")


def _refuse_present(out: Path) -> None:
    if out.is_dir():
        raise OutputExists(f"{out} is a folder; give --out the name of a new TOML file")
    if out.exists():
        raise OutputExists(f"{out} exists already; give --out the name of a new TOML file")


def _by_role(choices: list[Choice]) -> list[list[object]]:
    sites, ranks, numbers = Counter[str](), Counter[str](), Counter[str]()
    for choice in choices:
        sites[choice.site.role] += 1
        ranks[choice.site.role] += choice.rank
        numbers[choice.site.role] += choice.numbers
    return [[role, sites[role], total, numbers[role]] for role, total in ranks.most_common()]


def _toml(question: Question, choices: list[Choice]) -> str:
    """The run that the question and its answer declare."""
    chosen = fields_of(choices)
    data = {key: value for key, value in asdict(question.data).items() if value not in (None, ())}
    train = {key: value for key, value in asdict(question.train).items() if value != getattr(Train(), key)}
    tables: dict[str, dict[str, Any]] = {"data": data} | ({"train": train} if train else {})
    tables |= {"method": {"targets": chosen.targets}, "method.ranks": chosen.ranks}
    lines = [f"base = {_value(question.base)}"]
    for name, values in tables.items():
        lines += ["", f"[{name}]", *(f"{_value(key)} = {_value(value)}" for key, value in values.items())]
    return "\n".join([*lines, ""])


def _value(value: object) -> str:
    """JSON's texts, numbers and lists are TOML's, but for two halves of one character and for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
