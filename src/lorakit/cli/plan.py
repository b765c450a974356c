"""Say what a run takes on a machine, and how it is made to fit, before anything is loaded."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields

from lorakit.cli._show import console, program, say
from lorakit.reproduce.planning import Question, answer


@dataclass(frozen=True, kw_only=True)
class Options(Question):
    """A question, and how it is answered."""

    json: bool = False  # print the numbers as JSON


def main(options: Options) -> None:
    """Print the forecast and, where it fits, the flags to train with."""
    question = Question(**{field.name: getattr(options, field.name) for field in fields(Question)})
    found = answer(question)
    if options.json:
        console.print_json(json.dumps(found.to_json()))
        return
    say(str(found))
    if found.fits:
        chosen = f"--train.forward_tokens {found.forward_tokens} --train.checkpointing {found.checkpointing}"
        say(f"\n  {program()} train --base {shlex.quote(question.base)} {chosen} --data ... --out ...")
