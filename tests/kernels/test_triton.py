from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.kernels import launch
from tests.source import ROOT

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}  # the interpreter cuts bfloat16 where devices round
PLAIN = ("gate-float32-shape=(0, 37)", "norm-float32-shape=(0, 37)")
LEAST_SHARED = 99 * 1024  # bytes that every device from Ampere on has for one program


def started(*arguments: str, **environment: str) -> list[dict[str, Any]]:
    """What `python -m tests.kernels.started` prints, a dict a line."""
    pytest.importorskip("triton")
    environment = {**os.environ, **environment, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.kernels.started", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_interpreter_finds_what_plain_pytorch_does() -> None:
    (found,) = started(TRITON_INTERPRET="1")
    wrong = {
        case: said
        for case, said in found.items()
        if not said["started"] or not all(d <= TOLERANCES[case.split("-")[1]] for d in said["differences"].values())
    }
    assert len(found) > 40
    assert not wrong


@pytest.mark.slow
def test_the_kernels_compile_for_devices_that_are_not_here(tmp_path: Path) -> None:
    ampere, hopper = started("80", "90", TRITON_CACHE_DIR=str(tmp_path))
    kernels = {"_product", "_gradients", "_normed", "_gradient", "_row", "_add"}
    for found in (ampere, hopper):
        assert {name for case in found.values() for name in case} == kernels
        assert {case: shared for case, shared in found.items() if max(shared.values()) > LEAST_SHARED} == {}


def test_plain_pytorch_has_what_the_kernels_do_not_take() -> None:
    assert not launch.takes(torch.zeros(2))
    assert not launch.takes(torch.zeros(2, device="meta"))


def test_where_triton_does_not_start_a_warning_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lorakit"):
        assert not launch.runs_on(torch.device("cpu"))
    assert "Triton does not run on cpu, so plain PyTorch does" in caplog.text


def test_importing_the_kernels_imports_no_triton() -> None:
    names = "cross_entropy, gated, low_rank, norm, launch"
    code = f"import sys; from lorakit.kernels import {names}; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src", check=True)
    assert run.stdout.split() == ["False"]
