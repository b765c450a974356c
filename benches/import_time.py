"""How long `import lorakit` takes when torch is imported already, beside `import peft`: medians of interleaved runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from _record import options, record

LIMIT_SECONDS = 0.15
PACKAGES = ("lorakit", "peft")
SOURCE = Path(__file__).parents[1] / "src"
TIMED = """
import time, torch
start = time.perf_counter()
import {package}
print(time.perf_counter() - start)
"""


def added_seconds(package: str) -> float:
    """Seconds that importing `package` adds in a fresh process that has imported torch."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", TIMED.format(package=package)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def measure(rounds: int) -> dict[str, list[float]]:
    """Added seconds of each package, the packages taking turns; a first round that fills the disk cache is dropped."""
    times = [{package: added_seconds(package) for package in PACKAGES} for _ in range(rounds + 1)]
    return {package: [seconds[package] for seconds in times[1:]] for package in PACKAGES}


def main() -> None:
    """Measure, print, write, and fail when the limit is passed."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    seconds = measure(arguments.rounds)
    medians = {package: median(times) for package, times in seconds.items()}
    for package, times in seconds.items():
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(f"import {package:8} adds {medians[package]:.3f} s to import torch ({spread})")
    ratio = medians["lorakit"] / medians["peft"]
    print(f"lorakit / peft: {ratio:.3f}; the limit for lorakit is {LIMIT_SECONDS} s")
    result = {"seconds": seconds, "median_seconds": medians, "ratio_to_peft": ratio, "limit_seconds": LIMIT_SECONDS}
    record("import_time", result, arguments.json)
    if medians["lorakit"] >= LIMIT_SECONDS:
        sys.exit(f"import lorakit adds {medians['lorakit']:.3f} s, and may add {LIMIT_SECONDS} s")


if __name__ == "__main__":
    main()
