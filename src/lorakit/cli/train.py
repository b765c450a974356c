"""Train an adapter on a base model and a data set."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from rich.text import Text

from lorakit.cli._show import console, program, say, sides, size, table
from lorakit.reproduce.measures import classifies
from lorakit.reproduce.rehearsal import rehearse
from lorakit.reproduce.run import Run, carry_out
from lorakit.train import show
from lorakit.train.distributed import opened

LEARNED = "bold green"


@dataclass(frozen=True, kw_only=True)
class Options(Run):
    """A run, and whether it goes on from where one stopped, or does not begin at all."""

    resume: bool = False  # go on from the newest checkpoint in --out
    dry_run: bool = False  # show the plan and the first batch, write nothing and stop


def main(options: Options) -> None:
    """Carry out the run and tell what came out."""
    run = Run(**{field.name: getattr(options, field.name) for field in fields(Run)})
    with opened() as world:
        outcome = None if options.dry_run else carry_out(run, resume=options.resume, wrap=show)
    if not world.is_first:
        return
    if outcome is None:
        _rehearse(run, resume=options.resume)
        return
    found = {side: outcome.results[side] for side in ("base", "adapter") if side in outcome.results}
    if found:
        sides(f"{run.base} on {len(outcome.data.test):,} test examples of {outcome.data.name}", found)
    told = outcome.results
    table(
        "The run",
        ["", ""],
        [
            ["trained parameters", told["trainable_parameters"]],
            ["adapter file", f"{size(told['adapter_bytes'])} (the model: {size(told['model_bytes'])})"],
            ["steps", told["steps"]],
            ["training", f"{told['train_seconds']:.0f} s at {told['tokens_per_second']:.0f} tokens/s"],
            ["tokens", f"{told['tokens']:,}, of which {told['computed']:,} had to be computed"],
        ],
    )
    out = shlex.quote(run.out)
    use = f"eval {out}" if classifies(outcome.model) else f"generate {out} --prompt '...'"
    say(f"{run.out} holds the adapter, metrics.jsonl, loss.png, results.json and run.json. Try next:")
    say(f"  {program()} {use}")
    if "merge" not in run.method.waives:
        place = Path(run.out) if Path(run.out).name.strip(".") else Path(run.out).resolve()
        say(f"  {program()} merge {out} --out {shlex.quote(f'{place}-merged')}")


def _rehearse(run: Run, *, resume: bool) -> None:
    """Print the plan, and the first batch with what is learned of it in colour or in brackets."""
    told = rehearse(run, resume=resume)
    say(str(told.summary))
    table("The plan", ["", ""], told.plan)
    if told.forecast:
        say(told.forecast)
    say(Text(f"\nThe first batch: {len(told.batch)} examples, what is learned ", style="bold").append(_learned("so")))
    for number, example in enumerate(told.batch, start=1):
        say(f"\n{number}: {example.tokens} tokens, {example.labelled} to be learned")
        say(Text(example.read).append(_learned(example.learned)))
    say(f"\nNothing was written to {run.out}; without --dry-run the run begins.")


def _learned(text: str) -> Text:
    """Marked by colour, or where there is none by double brackets."""
    colourful = console.color_system is not None and not console.no_color
    return Text(text, style=LEARNED) if colourful else Text(f"[[{text}]]")
