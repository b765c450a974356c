"""A run of the command line's kind in a process of its own, to be killed: it says each step as it is taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from lorakit.reproduce.run import carry_out
from lorakit.train import Step
from tests.reproduce.small import evaluated


def said(steps: Iterator[Step]) -> Iterator[Step]:
    for step in steps:
        print(step.step, flush=True)
        yield step


if __name__ == "__main__":
    place, out = Path(sys.argv[1]), sys.argv[2]
    carry_out(evaluated(place, out), resume="--resume" in sys.argv, wrap=said)
