"""A small run on files: a tiny base, an encoder and labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.data import Data
from lorakit.reproduce.measures import Evaluate
from lorakit.reproduce.run import Run
from lorakit.train import Train
from tests.data.conftest import made
from tests.tiny import tiny


def write(place: Path) -> None:
    """The files that the runs read."""
    for name, family in (("base", "llama"), ("encoder", "bert")):
        tiny(family, vocab_size=400).save_pretrained(place / name)
        made().save_pretrained(place / name)
    rows = "".join(f"a {'good' * (n % 2)} film {n},{'good' if n % 2 else 'bad'}\n" for n in range(40))
    (place / "rows.csv").write_text("text,verdict\n" + rows)


def declared(place: Path, out: str = "out", **fields: Any) -> Run:
    """A run on those files."""
    data = Data(source=str(place / "rows.csv"), context="text", label="verdict")
    return Run(**{"base": str(place / "base"), "data": data, "out": str(place / out), **fields})


def evaluated(place: Path, out: str = "out", **fields: Any) -> Run:
    """A classifier that learns too fast, so that its best state is that of step 4, and two worse ones stop it at 8."""
    train = Train(steps=12, batch_size=4, learning_rate=0.1, evaluate_every=2, checkpoint_every=3, patience=2)
    base = str(place / "encoder")
    return declared(
        place, out, **{"base": base, "train": train, "evaluate": Evaluate(held_out=8), "keep": "best", **fields}
    )
