"""Send an adapter to the Hugging Face hub, with a card that tells of its run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.cli._show import program, say, size, table
from lorakit.interop.hub import Beside, pack, push
from lorakit.reproduce.demo import CURVE, METRICS
from lorakit.reproduce.run import RESULTS, RUN

BESIDE = Beside(run=RUN, results=RESULTS, metrics=METRICS, curve=CURVE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter to send, and where to."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    repo: str = field(metadata={"positional": True})  # owner/name at the hub; made if there is none
    private: bool = False  # make the repository private
    revision: str | None = None  # the branch, made if there is none; None: main
    message: str | None = None  # of the commit; None: names the base
    base: str | None = None  # the base's name at the hub; None: the one that the adapter names
    license: str | None = None  # of the adapter, in the hub's word for it, e.g. apache-2.0
    card: Literal["keep", "overwrite"] = "keep"  # a README.md that people wrote
    dry_run: bool = False  # show the files and the card, send nothing and stop


def main(options: Options) -> None:
    """List what is sent, and send it as one commit."""
    parcel = pack(
        Path(options.adapter), options.repo, BESIDE,
        base=options.base, license=options.license, overwrite=options.card == "overwrite",
    )  # fmt: skip
    table(f"For {options.repo}", ["file", "size"], [[name, size(count)] for name, count in parcel.sizes.items()])
    if options.dry_run:
        say(f"\n{parcel.card}\nNothing was sent; without --dry-run it is.")
        return
    sent = push(parcel, private=options.private, revision=options.revision, message=options.message)
    if sent.kept_card:
        say("The README.md there was edited and is kept; --card overwrite writes it anew.")
    say(f"{sent.url} holds the adapter (commit {sent.commit}). From anywhere:")
    name = shlex.quote(options.repo.rsplit("/", 1)[-1])
    revision = f" --revision {shlex.quote(options.revision)}" if options.revision else ""
    say(f"  {program()} pull {options.repo} --out {name}{revision}")
