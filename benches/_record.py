"""What every bench does with its result: print it, and write it down with its date, its versions and the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakit.version import VERSION

PACKAGES = ("lorakit", "torch", "transformers", "peft")


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that all benches share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    return parser


def record(name: str, result: dict[str, Any], file: Path | None) -> None:
    """Write `result` as dated JSON to `file`, or nothing if there is none."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    entry = {"bench": name, "date": datetime.now(UTC).isoformat(timespec="seconds"), **_surroundings(), **result}
    file.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def _surroundings() -> dict[str, Any]:
    return {
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    if package == "lorakit":
        return VERSION
    try:
        return version(package)
    except PackageNotFoundError:
        return None
