"""Runs the small training in a process of its own, telling each step, so that a test can kill it."""

import sys
from pathlib import Path

import torch

import lorakit as lk
from lorakit import train
from tests.train.small import SETTINGS, adapted, feed


def main(out: str, *, resume: bool) -> None:
    torch.set_num_threads(1)
    model = adapted()
    for step in train.run(model, feed(), SETTINGS, name="a", out=out, resume=resume):
        print(step.step, flush=True)
    sys.stdin.readline()  # a run that is to be killed does not get further
    lk.save(model, "a", Path(out) / "adapter")


if __name__ == "__main__":
    main(sys.argv[1], resume="--resume" in sys.argv)
