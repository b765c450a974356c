"""Settings of every test: one thread a worker, no network, fixed seeds, a cache folder of the session's own."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile

# Before torch and the Hugging Face libraries are imported, and inherited by the workers and subprocesses of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[switch] = "1"
if "LORAKIT_HOME" not in os.environ:
    os.environ["LORAKIT_HOME"] = tempfile.mkdtemp(prefix="lorakit-tests-")
    atexit.register(shutil.rmtree, os.environ["LORAKIT_HOME"], ignore_errors=True)

import numpy
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
