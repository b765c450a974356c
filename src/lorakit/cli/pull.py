"""Bring an adapter from the Hugging Face hub into a new folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.cli._show import program, say, size, table
from lorakit.cli.push import BESIDE
from lorakit.interop.hub import pull


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter to bring, and where to."""

    repo: str = field(metadata={"positional": True})  # owner/name at the hub
    out: str  # a folder that does not exist yet
    revision: str | None = None  # a branch, tag or commit; None: main
    subfolder: str = ""  # the repository's folder that holds the adapter


def main(options: Options) -> None:
    """Download the adapter's files and check them."""
    out = Path(options.out)
    found = pull(options.repo, out, BESIDE, revision=options.revision, subfolder=options.subfolder)
    table(str(out), ["file", "size"], [[name, size((out / name).stat().st_size)] for name in found.files])
    say(f"{options.repo} at commit {found.commit}, an adapter of {found.base or 'a base that it does not name'}. Next:")
    folder = shlex.quote(options.out)
    writes = found.base and found.task == "CAUSAL_LM"
    say(f"  {program()} generate {folder} --prompt '...'" if writes else f"  {program()} inspect {folder}")
