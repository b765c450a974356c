"""Choose which weights to adapt within a budget of trained numbers."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lorakit.cli._show import program, say, table
from lorakit.core.atomic import write_files
from lorakit.core.choose import Choice
from lorakit.reproduce.choosing import Question, answer, fields_of

SCORES = {"gradient": "gradient energy", "variance": "explained variance", "nfn": "normalised feature norm"}


@dataclass(frozen=True, kw_only=True)
class Options(Question):
    """A question, and where its answer goes."""

    out: str | None = None  # a TOML file that `lorakit train --config` reads


def main(options: Options) -> None:
    """Print the chosen sites and ranks, and how to train with them."""
    question = Question(**{field.name: getattr(options, field.name) for field in fields(Question)})
    choices = answer(question)
    spent = sum(choice.numbers for choice in choices)
    rows = [[c.site.path, c.site.role, c.rank, c.numbers, f"{c.score:.4g}"] for c in choices]
    columns = ["layer", "role", "rank", "numbers", SCORES[question.by]]
    table(f"{len(choices)} sites for {spent:,} of {question.budget:,} trained numbers", columns, rows, texts=2)
    table("By role", ["role", "sites", "ranks together", "numbers"], _by_role(choices))
    if options.out:
        out = Path(options.out)
        write_files(out.parent, {out.name: _toml(question, choices).encode()})
        say(f"Written to {options.out}. Train with it:")
        say(f"  {program()} train --config {shlex.quote(options.out)} --out out/chosen")


def _by_role(choices: list[Choice]) -> list[list[object]]:
    sites, ranks, numbers = Counter[str](), Counter[str](), Counter[str]()
    for choice in choices:
        sites[choice.site.role] += 1
        ranks[choice.site.role] += choice.rank
        numbers[choice.site.role] += choice.numbers
    return [[role, sites[role], total, numbers[role]] for role, total in ranks.most_common()]


def _toml(question: Question, choices: list[Choice]) -> str:
    """The run that the question and its answer declare; JSON's texts, lists and keys are TOML's."""
    chosen = fields_of(choices)
    data = {key: value for key, value in asdict(question.data).items() if value not in (None, ())}
    tables = {"data": data, "method": {"targets": chosen.targets}, "method.ranks": chosen.ranks}
    lines = [f"base = {json.dumps(question.base)}"]
    for name, values in tables.items():
        lines += ["", f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join([*lines, ""])
