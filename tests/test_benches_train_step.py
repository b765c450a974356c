"""The bench of training steps: what it counts, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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
