"""The bench of matrix products runs, and says what it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "benches" / "products.py"
SHAPES = ("576 to 576", "576 to 192", "576 to 1536", "1536 to 576", "576 to 49152")


@pytest.mark.slow
def test_each_product_is_compared_and_timed(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, str(BENCH), "--quick", "--json", str(file)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    found = json.loads(file.read_text())
    thin = [f"{product} {width} to 8" for product in ("x Aᵀ", "gᵀ x") for width in (576, 1536)]
    for name in [f"{way} {shape}" for way in ("forward", "backward") for shape in SHAPES] + thin:
        result = found[name]
        assert result["ratio_to_pytorch"] == pytest.approx(result["pytorch"] / result["ours"])
        assert f"| {name} |" in told.stdout
    for name in ("siblings qkv", "siblings gate_up"):
        result = found[name]
        assert result["ratio_to_stacked"] == pytest.approx(result["stacked"] / result["apart"])
        saved = result["apart"] - result["stacked"]
        assert result["share_of_layer"] == pytest.approx(saved / found["block_seconds"])
