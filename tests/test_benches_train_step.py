"""The bench of training steps: what it counts, and that it runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benches._measure import SavedBytes, cosine, gradients, interleaved, needed_flops
from tests.tiny import tiny

BENCH = Path(__file__).parents[1] / "benches" / "train_step.py"
CASE = "c-qv"


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    layers = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))
    x = torch.randn(2, 4)
    with SavedBytes(layers).counted() as saved:
        loss = (layers[0](x) * layers[1](x)).sum()  # x for both layers, and both outputs for their product
        assert saved.now == 4 * (2 * 4 + 2 * 3 + 2 * 3)
        loss.backward()
    assert saved.now == 0
    assert saved.most == 4 * (2 * 4 + 2 * 3 + 2 * 3)


def test_saved_bytes_of_two_passes_are_those_of_the_larger() -> None:
    layer = nn.Linear(4, 3, bias=False)
    with SavedBytes(layer).counted() as saved:
        for rows in (2, 5, 3):
            layer(torch.randn(rows, 4)).sum().backward()
    assert saved.most == 4 * 5 * 4


def test_gradients_are_kept_as_backward_made_them() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with gradients({"w": layer.weight}) as found:
        layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
        layer.zero_grad()
    assert found["w"].tolist() == [[3.0, 4.0]]


def test_cosine_refuses_gradients_of_other_tensors() -> None:
    with pytest.raises(SystemExit, match="different tensors"):
        cosine({"a": torch.ones(1)}, {"b": torch.ones(1)})
    assert cosine({"a": torch.ones(1)}, {"a": -torch.ones(1)}) == pytest.approx(-1)


def test_each_takes_each_batch_once_a_round_and_is_first_in_turn() -> None:
    taken: list[str] = []

    def steps(name: str) -> Iterator[None]:
        while True:
            taken.append(name)
            yield

    seconds = interleaved({name: steps(name) for name in "xyz"}, batches=2, rounds=3)
    assert "".join(taken) == "xyzyzxzxy" * 2
    assert [[len(batch) for batch in spent] for spent in seconds.values()] == [[3, 3]] * 3


def test_needed_flops_are_counted_by_hand() -> None:
    model = tiny("llama")
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    head, config = model.lm_head.weight.numel(), model.config
    context = tuple(range(3, 23))
    batch = [SimpleNamespace(ids=(*context, *rest), start=20) for rest in ((30, 31), (40, 41, 42))]
    tokens, labelled = 20 + 1 + 2, 5  # the context once; what is only predicted is no input
    pairs = 20 * 21 / 2 + 21 + (21 + 22)
    attention = 3.5 * 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs
    found = needed_flops(model, batch, adapter=10)
    assert found["lora"] == 4 * linear * tokens + 4 * head * labelled + 6 * 10 * tokens + attention
    assert found["full"] == 6 * linear * tokens + 6 * head * labelled + attention


@pytest.mark.slow
def test_the_bench_runs_and_says_where_each_library_is(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    scenario, targets = CASE.split("-")
    command = [sys.executable, str(BENCH), "--quick", "--scenario", scenario, "--targets", targets, "--json", str(file)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    assert "is the loss of the first step" in told.stdout
    found = json.loads(file.read_text())
    assert found["e2e"] == "synthetic"
    for peer in ("peft", "trainer", "trl", "full"):
        assert found[CASE][f"ratio_to_{peer}"] == pytest.approx(found[CASE][peer] / found[CASE]["ours"])
        assert found[CASE]["saved_bytes"]["ours"] < found[CASE]["saved_bytes"][peer]


SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    tie_word_embeddings=False,
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bench as it is on a CUDA device, with a small Llama on the CPU, and a device that only counts."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    bench = importlib.import_module("train_step")
    here = bench.Place("none", "cpu", torch.bfloat16, bench._cuda)
    few = [bench.Encoded(tuple(range(1, length)), length // 2) for length in range(9, 25)]
    small = {
        name: replace(scenario, shape=SMALL, examples=lambda *given: few) for name, scenario in bench.ON_CUDA.items()
    }
    monkeypatch.setattr(bench, "place", lambda: here)
    monkeypatch.setattr(bench, "ON_CUDA", small)
    monkeypatch.setattr(bench, "models", SimpleNamespace(load=lambda name: (None, None)))
    for name, told in {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda told=told: told)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    return bench


def told_by(bench: ModuleType, file: Path, monkeypatch: pytest.MonkeyPatch, *scenarios: str) -> dict[str, Any]:
    command = ["train_step.py", "--quick", "--scenario", *scenarios, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    return dict(json.loads(file.read_text()))


@pytest.mark.slow
def test_on_cuda_a_large_model_is_measured_with_and_without_checkpointing(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told_by(bench, tmp_path / "found.json", monkeypatch, "8b", "8b-blocks")
    told = capsys.readouterr().out
    assert told.count("is the loss of the first step") == 2
    assert found["dtype"] == "bfloat16"
    for case in ("8b-all", "8b-blocks-all"):
        assert found[case]["ratio_to_peft"] == pytest.approx(found[case]["peft"] / found[case]["ours"])
        assert found[case]["peak_bytes"] == {"ours": 700, "peft": 700}
        assert found[case]["out_of_memory"] == []
    plain, blocks = (found[case]["saved_bytes"] for case in ("8b-all", "8b-blocks-all"))
    assert all(blocks[name] < plain[name] for name in ("ours", "peft"))


@pytest.mark.slow
def test_a_peer_that_does_not_fit_into_memory_is_named(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Iterator[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setitem(importlib.import_module("_peers").PEERS, "peft", full)
    found = told_by(bench, tmp_path / "found.json", monkeypatch, "8b")["8b-all"]
    assert found["out_of_memory"] == ["peft"]
    assert set(found["peak_bytes"]) == {"ours"} and "ratio_to_peft" not in found


def test_a_step_is_over_when_the_device_has_done_them(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    steps = iter(lambda: done.append("step"), "")
    bench._cuda.interleaved({"x": steps}, batches=1, rounds=2)
    assert done == ["waited", "step", "waited", "step", "waited"]


def test_the_large_model_reads_long_rows_of_which_half_is_learned(bench: ModuleType) -> None:
    rows = importlib.import_module("_scenarios").ON_CUDA["8b"].examples(None, None)
    lengths = [len(row.ids) for row in rows]
    assert min(lengths) == 128 and max(lengths) == 1024
    assert all(row.start == len(row.ids) // 2 for row in rows)


def test_the_large_model_is_a_llama_of_8_billion_parameters(bench: ModuleType) -> None:
    shape = importlib.import_module("_scenarios").EIGHT_BILLION
    base = importlib.import_module("_peers").Base(torch.bfloat16, "meta", shape)
    model, _ = base.load()
    assert model.num_parameters() == 8_030_261_248  # what Llama 3.1 8B has
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.rope_parameters["rope_theta"] == 500_000
