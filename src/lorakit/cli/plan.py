"""Say what a run takes on a machine, and how it is made to fit, before anything is loaded."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields, replace

from lorakit.cli._declare import words_of
from lorakit.cli._show import console, program, say
from lorakit.reproduce.planning import Question, answer, has_weights
from lorakit.reproduce.run import Run
from lorakit.train.forecast import Forecast


@dataclass(frozen=True, kw_only=True)
class Options(Question):
    """A question, and how it is answered."""

    json: bool = False  # print the numbers as JSON


def main(options: Options) -> None:
    """Print the forecast and, where it fits and the base can be trained, the command that trains it."""
    question = Question(**{field.name: getattr(options, field.name) for field in fields(Question)})
    found = answer(question)
    if options.json:
        console.print_json(json.dumps(found.to_json()))
        return
    say(str(found))
    if found.fits and has_weights(question.base) and question.dtype != "float16":  # in which no run trains
        say(f"\n  {program()} train {shlex.join(_words(question, found))} --data ... --out ...")


def _words(question: Question, found: Forecast) -> list[str]:
    """What was asked, and what was chosen."""
    train = replace(question.train, forward_tokens=found.forward_tokens, checkpointing=found.checkpointing)
    told = {field.name: getattr(question, field.name) for field in fields(question)}
    return words_of(Run, told | {"train": train, "dtype": question.dtype or "auto"})
