"""Two processes train as one does: over copies of the base, over one that they share, and when one of them is lost."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit import train
from lorakit.train import checkpoint
from lorakit.train.distributed import World
from lorakit.train.metrics import read
from tests.reproduce import small as files
from tests.train import several
from tests.train.several import LORA, Order
from tests.train.small import SETTINGS, Encoded, adapted, feed

ROOT = Path(__file__).parents[2]
NEAR = 1e-5  # of the largest value
MIDWAY = {"stop_after": 7}
ALONE = {"batch_size": 1, "accumulate": 1}  # one example a step, so that one of two processes has none
RUNS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "shard": {"settings": {"sharding": "shard"}},
    "no-room": {"room_bytes": 0},
    "replicate-alone": {"settings": ALONE},
    "shard-alone": {"settings": {**ALONE, "sharding": "shard"}},
    "shard-in-parts": {"settings": {"forward_tokens": 12, "checkpointing": "blocks", "sharding": "shard"}},
    "penalty": {"method": {"name": "adalora"}},
    "dropout": {"method": {**LORA, "dropout": 0.5}},
    "dropout-stopped": {"method": {**LORA, "dropout": 0.5}, **MIDWAY},
    "little-memory": {"most_tokens": 12},
    "patience": {"settings": {"evaluate_every": 2, "patience": 2}},
    "two-then-one": MIDWAY,
}
AFTER = {  # they go on in the folder of another run
    "dropout-stopped": {"method": {**LORA, "dropout": 0.5}, "resume": True},
    "one-then-two": {"settings": {"sharding": "shard"}, "resume": True},
}


def started(orders: list[dict[str, Any]], *words: str, size: int = 2) -> list[subprocess.Popen[str]]:
    """The processes that carry out these runs together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.several", json.dumps(orders), *words]
    environment = {**os.environ, **common, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each of them said on standard error, in the end."""
    return [process.communicate(timeout=120)[1] for process in processes]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each run of two processes, and under `one` with the same run of one."""
    folder = tmp_path_factory.mktemp("several")
    several.carry_out(Order(out=str(folder / "one-then-two"), stop_after=7))
    orders = [{"out": str(folder / name), **order} for runs in (RUNS, AFTER) for name, order in runs.items()]
    processes = started(orders)
    for name, order in RUNS.items():
        several.carry_out(Order(out=str(folder / "one" / name), **{**order, "stop_after": 99}))
    said = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], said[0]
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read(folder)]


def differ(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, as a share of the largest value of the tensor."""
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).abs().max() / one[key].abs().max()).item() for key in one)


def assert_same(folder: Path, one: Path) -> None:
    assert losses(folder) == pytest.approx(losses(one), rel=NEAR)
    found, wanted = (load_file(each / "rank-0.safetensors") for each in (folder, one))
    assert differ(found, wanted) < NEAR


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith(("dropout", "two"))])
def test_two_processes_are_one(place: Path, name: str) -> None:
    assert_same(place / name, place / "one" / name)
    first, second = (load_file(place / name / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    ours, theirs = read(place / name), read(place / "one" / name)
    for key in ("tokens", "labelled"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


def test_a_base_that_is_shared_out_is_held_in_parts(place: Path) -> None:
    held = {}
    for name in ("replicate", "shard", "no-room"):
        with safe_open(place / name / "rank-1.safetensors", "pt") as file:
            held[name] = int(file.metadata()["parameters"])
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)  # of two blocks: q, o; k, v; gate, up, down
    assert held["replicate"] - held["shard"] == matrices // 2
    assert held["no-room"] == held["shard"]  # "auto" asks the planner


def test_an_adapter_over_a_shared_base_is_the_same_file(place: Path) -> None:
    files = [(place / name / "adapter" / "adapter_config.json").read_bytes() for name in ("replicate", "shard")]
    assert files[0] == files[1]
    headers = []
    for name in ("replicate", "shard"):
        with safe_open(place / name / "adapter" / "adapter_model.safetensors", "pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]


def test_what_the_first_process_evaluates_stops_both(place: Path) -> None:
    assert len(losses(place / "patience")) == 6 and (place / "patience" / "rank-1.safetensors").exists()


def test_dropout_differs_by_process_and_resumes_to_the_same_bits(place: Path) -> None:
    whole, resumed = (load_file(place / name / "rank-1.safetensors") for name in ("dropout", "dropout-stopped"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(place / "dropout") == losses(place / "dropout-stopped")
    assert losses(place / "dropout") != pytest.approx(losses(place / "one" / "dropout"), rel=NEAR)


def test_what_two_began_one_ends(place: Path) -> None:
    several.carry_out(Order(out=str(place / "two-then-one"), resume=True))
    assert_same(place / "two-then-one", place / "one" / "replicate")


def test_what_one_began_two_end(place: Path) -> None:
    assert_same(place / "one-then-two", place / "one" / "replicate")
    kept = sorted(path.name for path in (place / "one-then-two" / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("harm", ["part", "lost part", "list"])
def test_a_damaged_folder_is_passed_over(place: Path, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(place / "shard" / "checkpoints", tmp_path / "checkpoints")
    found = checkpoint.newest(folder)
    assert found is not None and found.step == 12
    damaged = max((folder / "step-00000012").glob("parts.json" if harm == "list" else "shard-*"))
    if harm == "lost part":
        damaged.unlink()
    else:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 255
        damaged.write_bytes(content)
    found = checkpoint.newest(folder)
    assert found is not None and found.step == 9


def shares(lengths: list[int], batches: list[list[int]], size: int, *, contexts: list[int] | None = None) -> Any:
    """What each process reads; examples of one context begin alike."""
    heads = contexts or list(range(len(lengths)))
    data = feed([Encoded((head,) * 10 + (99,) * length, 10) for head, length in zip(heads, lengths, strict=True)])
    return [data.share(batches, rank, size, contexts=contexts is not None) for rank in range(size)]


def test_every_example_is_read_by_one_process() -> None:
    batches = [[0, 3, 4], [1, 2], [5]]
    found = shares([5, 1, 9, 2, 2, 7], batches, 3)
    for number, batch in enumerate(batches):
        assert sorted(example for share in found for example in share[number]) == sorted(batch)
    assert shares([5, 1], [[1, 0]], 1) == [[[1, 0]]]


def test_processes_read_about_as_many_tokens() -> None:
    lengths = [(7 * number) % 31 + 1 for number in range(64)]
    loads = [sum(lengths[each] + 10 for each in share[0]) for share in shares(lengths, [list(range(64))], 4)]
    assert max(loads) - min(loads) <= 2
    alone = shares([4] * 8, [[number] for number in range(8)], 2)
    assert [sum(map(len, share)) for share in alone] == [4, 4]


def test_a_context_stays_in_one_process_unless_others_would_go_without() -> None:
    (first,), (second,) = shares([3] * 6, [[0, 1, 2, 3, 4, 5]], 2, contexts=[7, 8, 7, 8, 7, 8])
    assert {tuple(first), tuple(second)} == {(0, 2, 4), (1, 3, 5)}
    found = shares([3] * 8, [list(range(8))], 4, contexts=[7] * 8)
    assert [len(share[0]) for share in found] == [2, 2, 2, 2]


def test_one_process_is_a_world_of_its_own() -> None:
    alone, parameter = World(), torch.nn.Parameter(torch.ones(2))
    parameter.grad = gradient = torch.ones(2)
    alone.add_gradients([parameter])
    assert parameter.grad is gradient
    assert alone.gather([1.5, 2]) == [[1.5, 2]] and alone.told("a") == "a" and alone.seed(3) == 3


def test_one_process_shares_nothing_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        steps = train.run(adapted(), feed(), replace(SETTINGS, steps=1, sharding="shard"), name="a")
    assert "stays whole" in caplog.text and next(steps).step == 1


def resumed_is_whole(folder: Path, killed: str, done: int) -> None:
    """The killed run has all steps before its end, and one process can go on from there."""
    found = checkpoint.newest(folder / killed / "checkpoints")
    assert found is not None and found.step == done
    several.carry_out(Order(out=str(folder / killed), resume=True))
    several.carry_out(Order(out=str(folder / "whole")))
    assert_same(folder / killed, folder / "whole")


def lorakit(place: Path, out: str, *words: str, size: int = 2) -> subprocess.CompletedProcess[str]:
    """`lorakit train` under torchrun, or alone."""
    data = ["--data.source", "rows.csv", "--data.context", "text", "--data.label", "verdict"]
    told = ["train", "--base", "base", *data, "--out", out, "--train.steps", "6", "--train.batch_size", "4", *words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, "-m", "lorakit", *told]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    files.write(tmp_path)
    kept = ["--train.evaluate_every", "2", "--keep", "best", "--evaluate.held_out", "8"]
    one = lorakit(tmp_path, "one", *kept, size=1)
    for sharding in ("replicate", "shard"):
        two = lorakit(tmp_path, sharding, *kept, "--train.sharding", sharding)
        assert two.returncode == one.returncode == 0, two.stderr
        assert two.stdout.count("trained parameters") == 1  # one process prints
        assert losses(tmp_path / sharding) == pytest.approx(losses(tmp_path / "one"), rel=NEAR)
        ours, theirs = (json.loads((tmp_path / out / "results.json").read_text()) for out in (sharding, "one"))
        assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=NEAR)
        assert (ours["kept_step"], ours["adapter"]) == (theirs["kept_step"], theirs["adapter"])
        assert sorted(path.name for path in (tmp_path / sharding).iterdir()) == sorted(
            path.name for path in (tmp_path / "one").iterdir()
        )
    again = lorakit(tmp_path, "one", *kept, "--resume")
    assert again.returncode == 0 and "trained parameters" in again.stdout
    refused = lorakit(tmp_path, "one")
    assert refused.returncode != 0 and refused.stderr.count("lorakit: ") == 1 and "holds another run" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends(tmp_path: Path, sharding: str, killed: int) -> None:
    settings = {"sharding": sharding, "checkpoint_every": 5}
    order = {"out": str(tmp_path / "killed"), "settings": settings, "signal": (killed, 8, signal.SIGKILL)}
    processes = started([order])
    began = time.monotonic()
    said = ended(processes)
    assert time.monotonic() - began < 90
    assert processes[killed].returncode == -signal.SIGKILL
    assert processes[1 - killed].returncode == 1
    assert "another process of this run has ended or" in said[1 - killed]
    # the first process has the state after step 7 and writes it; without it there is the last checkpoint
    resumed_is_whole(tmp_path, "killed", 7 if killed else 5)


@pytest.mark.slow
def test_sigterm_for_one_ends_both_with_a_checkpoint(tmp_path: Path) -> None:
    processes = started([{"out": str(tmp_path / "stopped"), "signal": (1, 8, signal.SIGTERM)}])
    said = ended(processes)
    assert [process.returncode for process in processes] == [1, 2]
    assert "Interrupted: " in said[0] and "stopped after step 8 of 12" in said[0] and "--resume" in said[0]
    resumed_is_whole(tmp_path, "stopped", 8)


@pytest.mark.slow
def test_a_process_that_does_not_answer_counts_as_gone(tmp_path: Path) -> None:
    processes = started([{"out": str(tmp_path / "stuck"), "signal": (1, 8, signal.SIGSTOP)}], "5")
    said = processes[0].communicate(timeout=120)[1]
    processes[1].kill()
    ended(processes[1:])
    assert "does not answer" in said and processes[0].returncode == 1
    resumed_is_whole(tmp_path, "stuck", 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"nan_at": 11}, r"Diverged: step \d+ has .* in the batch of examples \d+, .* is model.embed_tokens"),
        ({"nan_at": 11, "settings": {"sharding": "shard"}}, r"Diverged: step \d+ has .* is model.embed_tokens"),
        ({"seeds": (0, 1)}, "LorakitError: the processes of this run differ: data is .* in process 1"),
        ({"method": {"name": "full"}, "settings": {"sharding": "shard"}}, "BadModel: .* cannot be shared out: full"),
    ],
)
def test_what_is_wrong_ends_all_in_a_sentence(tmp_path: Path, order: dict[str, Any], expected: str) -> None:
    processes = started([{"out": str(tmp_path / "wrong"), **order}])
    said = ended(processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert any(re.search(expected, each) for each in said), said


@pytest.mark.slow
def test_too_little_memory_for_a_shared_base_ends_the_run(tmp_path: Path) -> None:
    order = {"out": str(tmp_path / "wrong"), "most_tokens": 5, "settings": {"sharding": "shard"}}
    said = ended(processes := started([order]))
    assert [process.returncode for process in processes] == [1, 1]
    assert re.search("OutOfMemory: step 1 does not fit into the memory of process 1.* forward_tokens", said[1])
    assert "another process of this run has ended or" in said[0]
