"""Train an adapter on a base model and a data set."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from lorakit.cli._show import program, say, sides, size, table
from lorakit.reproduce.measures import classifies
from lorakit.reproduce.run import Run, carry_out
from lorakit.train import show


@dataclass(frozen=True, kw_only=True)
class Options(Run):
    """A run, and whether it goes on from where one stopped."""

    resume: bool = False  # go on from the newest checkpoint in --out


def main(options: Options) -> None:
    """Carry out the run and tell what came out."""
    run = Run(**{field.name: getattr(options, field.name) for field in fields(Run)})
    outcome = carry_out(run, resume=options.resume, wrap=show)
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
        ],
    )
    out = shlex.quote(run.out)
    use = f"eval {out}" if classifies(outcome.model) else f"generate {out} --prompt '...'"
    say(f"{run.out} holds the adapter, metrics.jsonl, loss.png, results.json and run.json. Try next:")
    say(f"  {program()} {use}")
    if "merge" not in run.method.waives:
        say(f"  {program()} merge {out} --out {shlex.quote(f'{run.out}-merged')}")
