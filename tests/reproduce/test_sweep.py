"""A sweep leaves what as many runs of their own would have left, goes on from where it stopped, and fails in parts."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Interrupted, LorakitError, MissingPackage, OutputExists
from lorakit.methods.lora import LoRA
from lorakit.reproduce import run as whole
from lorakit.reproduce import sweep as module
from lorakit.reproduce.measures import Evaluate
from lorakit.reproduce.run import Run
from lorakit.reproduce.sweep import Row, Sweep, Values, carry_out, sharing, tabled
from lorakit.train import Train
from tests.reproduce.test_run import declared
from tests.source import ROOT

__all__ = ["declared"]
TIMES = ("train_seconds", "tokens_per_second")
OVER = {"method.rank": [2, 4], "train.seed": [0, 1]}


def sweep_of(declared: Run, over: Any = OVER, **changes: Any) -> Sweep:
    return Sweep(**vars(declared) | {"sweep": over, "at_once": 3} | changes)


def declaring(declared: Run) -> Callable[[Values], Run]:
    """By hand what the command line does for any field."""

    def declare(values: Values) -> Run:
        made = replace(declared, base=values.get("base", declared.base))
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("train.")}
        return replace(made, method=LoRA(rank=values.get("method.rank", 2)), train=replace(declared.train, **own))

    return declare


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key not in TIMES}


def same_folders(one: Path, other: Path) -> None:
    """The same files with the same bytes, but for the time that a step took."""
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    timed = {Path(name) for name in ("metrics.jsonl", "results.json", "run.json", "loss.png")}
    assert [str(file) for file in files - timed if (one / file).read_bytes() != (other / file).read_bytes()] == []
    assert without_times(read(one / "results.json")) == without_times(read(other / "results.json"))
    runs = [read(folder / "run.json") for folder in (one, other)]
    assert [told["run"].pop("out") for told in runs] == [str(one), str(other)] and runs[0] == runs[1]
    losses = [[json.loads(row)["loss"] for row in (folder / "metrics.jsonl").open()] for folder in (one, other)]
    assert losses[0] == losses[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_run_leaves_what_it_leaves_by_itself(declared: Run, tmp_path: Path) -> None:
    learned = Train(steps=6, batch_size=4, evaluate_every=2, checkpoint_every=3)
    declared = replace(declared, train=learned, evaluate=Evaluate(held_out=6), keep="best")
    table = carry_out(sweep_of(declared), declare := declaring(declared))
    assert [row.error for row in table.rows] == [""] * 4
    for row in table.rows:
        alone = tmp_path / "alone" / row.name
        whole.carry_out(replace(declare(row.values), out=str(alone)))
        same_folders(Path(declared.out) / row.name, alone)
        assert row.results == read(Path(declared.out) / row.name / "results.json")


def test_a_base_is_loaded_and_measured_once(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str, real: Any) -> Any:
        return lambda *given, **told: calls.append(f"{name} {list(given[4:5])}") or real(*given, **told)

    monkeypatch.setattr(module, "prepare", counted("prepare", module.prepare))
    monkeypatch.setattr(whole, "compare", counted("compare", whole.compare))
    carry_out(sweep_of(declared), declaring(declared))
    assert len([call for call in calls if call.startswith("prepare")]) == 1
    assert len([call for call in calls if "'base'" in call]) == 1
    assert len([call for call in calls if "'adapter'" in call]) == 4


def test_a_run_that_fails_does_not_end_the_others(declared: Run) -> None:
    table = carry_out(sweep_of(declared, {"method.rank": [99, 2], "train.max_length": [1, 99]}), declaring(declared))
    told = {row.name: row.error for row in table.rows}
    assert [row.name for row in table.rows if row.results] == ["rank=2,max_length=99"] == [table.rows[0].name]
    assert told.pop("rank=2,max_length=99") == ""
    assert told["rank=99,max_length=99"].startswith("rank 99 is above the matrix")
    assert "max_length=1" in told["rank=2,max_length=1"]
    kept = read(Path(declared.out) / "sweep.json")["runs"]
    assert {row["name"]: row["error"] for row in kept if row["error"]} == told
    assert not (Path(declared.out) / "rank=99,max_length=1").exists()


def test_a_base_that_cannot_be_loaded_fails_its_own_runs(declared: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    over = {"base": [str(tmp_path / "empty"), declared.base], "train.seed": [0, 1]}
    table = carry_out(sweep_of(declared, over), declaring(declared))
    assert [row.name for row in table.rows if row.results] == ["base=no2,seed=0", "base=no2,seed=1"]
    assert all("empty" in row.error for row in table.rows if not row.results)


def stop_at(name: str, step: int) -> Any:
    def wrap(turns: Any) -> Iterator[Any]:
        for turn in turns:
            yield turn
            if (turn[0], turn[1].step) == (name, step):
                raise KeyboardInterrupt

    return wrap


def test_a_stopped_sweep_goes_on_to_the_same_bytes(declared: Run, tmp_path: Path) -> None:
    sweep, declare = sweep_of(declared), declaring(declared)
    undisturbed = replace(sweep, out=str(tmp_path / "undisturbed"))
    carry_out(undisturbed, declare)
    with pytest.raises(Interrupted, match="checkpoint in their folders"):
        carry_out(sweep, declare, wrap=stop_at("rank=4,seed=1", 2))  # the fourth: the others have ended
    assert [bool(row["results"]) for row in read(Path(sweep.out) / "sweep.json")["runs"]] == [True] * 3 + [False]
    with pytest.raises(OutputExists, match="holds another sweep"):
        carry_out(sweep, declare)
    finished = contents(Path(sweep.out) / "rank=2,seed=0")
    taken: list[tuple[str, int]] = []
    carry_out(sweep, declare, resume=True, wrap=lambda turns: (taken.append((n, s.step)) or (n, s) for n, s in turns))
    assert taken == [("rank=4,seed=1", step) for step in (3, 4, 5, 6)]
    assert contents(Path(sweep.out) / "rank=2,seed=0") == finished
    for name in sweep.combinations():
        tensors = [Path(place.out) / name / "adapter_model.safetensors" for place in (sweep, undisturbed)]
        assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_a_stopped_sweep_tells_what_has_failed(declared: Run) -> None:
    sweep = sweep_of(declared, {"method.rank": [99, 2]})
    with pytest.raises(Interrupted):
        carry_out(sweep, declaring(declared), wrap=stop_at("rank=2", 2))
    errors = {row["name"]: row["error"] for row in read(Path(sweep.out) / "sweep.json")["runs"]}
    assert errors["rank=99"].startswith("rank 99 is above the matrix") and errors["rank=2"] == ""


def test_a_finished_sweep_loads_nothing(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, declare = sweep_of(declared, {"train.seed": [0, 1]}), declaring(declared)
    first = carry_out(sweep, declare)
    monkeypatch.setattr(module, "prepare", None)
    assert carry_out(sweep, declare, resume=True) == first
    with pytest.raises(LorakitError, match="have no 'acuracy' to sort them by; did you mean accuracy"):
        carry_out(replace(sweep, by="acuracy"), declare, resume=True)
    assert carry_out(replace(sweep, by="steps"), declare, resume=True).by == "steps"


def test_results_of_other_settings_are_refused_and_kept(declared: Run) -> None:
    sweep = sweep_of(declared, {"train.seed": [0]})
    carry_out(sweep, declaring(declared))
    before = contents(Path(sweep.out))
    for changes, sentence in (
        ({"train": replace(declared.train, steps=7)}, "holds results of other settings: train.steps is 6 there and 7"),
        ({"evaluate": Evaluate(measures="perplexity")}, r"evaluate.measures is \[\] there and \['perplexity'\] here"),
    ):
        with pytest.raises(OutputExists, match=sentence):
            carry_out(sweep, declaring(replace(declared, **changes)), resume=True)  # type: ignore[arg-type]
        assert contents(Path(sweep.out)) == before


def test_what_decides_on_no_result_may_change(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(declared, {"train.seed": [0]})
    first = carry_out(sweep, declaring(declared))
    monkeypatch.setattr(module, "prepare", None)
    monkeypatch.setattr(module, "require", lambda service: None)
    changed = replace(declared, track="wandb", train=replace(declared.train, forward_tokens=64))
    assert carry_out(sweep, declaring(changed), resume=True) == first


def test_a_resumed_sweep_has_all_results_of_before(declared: Run) -> None:
    carry_out(sweep_of(declared, {"method.rank": [2, 99]}), declare := declaring(declared))
    before = contents(Path(declared.out))
    with pytest.raises(OutputExists, match=r"results of runs that are not in this sweep \(rank=2\); add their values"):
        carry_out(sweep_of(declared, {"method.rank": [3]}), declare, resume=True)
    assert contents(Path(declared.out)) == before
    table = carry_out(sweep_of(declared, {"method.rank": [2, 3]}), declare, resume=True)  # 99 has no results
    assert {row.name for row in table.rows if row.results} == {"rank=2", "rank=3"}


@pytest.mark.parametrize(
    ("name", "advice"), [("sweep.json", "remove it"), ("seed=0/run.json", "remove its folder to run it again")]
)
def test_a_damaged_record_is_a_sentence(declared: Run, name: str, advice: str) -> None:
    sweep = sweep_of(declared, {"train.seed": [0]})
    carry_out(sweep, declaring(declared))
    (Path(sweep.out) / name).write_text('{"run')
    with pytest.raises(LorakitError, match=f"{name} is damaged.*; {advice}"):
        carry_out(sweep, declaring(declared), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_sweep_does_not_go_into_the_folder_of_a_run(declared: Run, resume: bool) -> None:
    whole.carry_out(declared)
    before = contents(Path(declared.out))
    with pytest.raises(OutputExists, match=r"holds a run \(it has training.json, .*choose another folder"):
        carry_out(sweep_of(declared), declaring(declared), resume=resume)
    assert contents(Path(declared.out)) == before


def test_fresh_heads_of_several_seeds_are_on_bases_of_their_own(declared: Run, tmp_path: Path) -> None:
    encoder = replace(declared, base=str(tmp_path / "encoder"))
    runs = {name: declaring(encoder)(values) for name, values in sweep_of(encoder).combinations().items()}
    assert [list(group) for group in sharing(runs)] == [["rank=2,seed=0", "rank=4,seed=0"],
                                                        ["rank=2,seed=1", "rank=4,seed=1"]]  # fmt: skip
    table = carry_out(sweep_of(encoder), declaring(encoder))
    (row,) = (row for row in table.rows if row.name == "rank=4,seed=1")
    alone = tmp_path / "alone" / row.name
    whole.carry_out(replace(runs[row.name], out=str(alone)))
    same_folders(Path(encoder.out) / row.name, alone)


def test_names_tell_values_apart(declared: Run) -> None:
    over = {"train.seed": [0], "data.seed": [1], "method": {"targets": [["attn.q"], ["attn.v"]]}, "base": ["a/b", "c"]}
    names = list(sweep_of(declared, over).combinations())
    assert names[:2] == ["train.seed=0,data.seed=1,targets=no1,base=no1", "train.seed=0,data.seed=1,targets=no1,base=c"]
    assert len(set(names)) == 4


def test_so_many_combinations_are_picked_by_a_seed(declared: Run) -> None:
    over = {"method.rank": [1, 2, 3, 4], "train.seed": [0, 1, 2]}
    every = list(sweep_of(declared, over).combinations())
    picked = [list(sweep_of(declared, over, pick=5, pick_seed=seed).combinations()) for seed in (0, 0, 1)]
    assert len(every) == 12 and len(picked[0]) == 5
    assert picked[0] == picked[1] != picked[2] and picked[0] == [name for name in every if name in picked[0]]
    assert list(sweep_of(declared, over, pick=99).combinations()) == every


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({}, "nothing varies"),
        ({"train.seed": 3}, "train.seed must be a list of values, not 3"),
        ({"train": {"seed": []}}, "train.seed must be a list of values"),
        ({"train.seed": [1, 1]}, "train.seed has a value twice"),
        ({"out": ["a", "b"]}, "out cannot vary"),
    ],
)
def test_what_cannot_vary_is_refused(declared: Run, over: Any, sentence: str) -> None:
    with pytest.raises(LorakitError, match=sentence):
        carry_out(sweep_of(declared, over), declaring(declared))
    assert not Path(declared.out).exists()


def test_sizes_of_a_sweep_are_refused(declared: Run) -> None:
    with pytest.raises(LorakitError, match=r"at_once=0 must be at least 1; pick=0 must be at least 1"):
        sweep_of(declared, at_once=0, pick=0)


def test_the_best_comes_first(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "a": {"loss": 1.0, "adapter": {"accuracy": 0.5}},
        "b": {"loss": 2.0, "adapter": {"accuracy": 0.9}},
        "c": {"loss": float("nan"), "adapter": {"accuracy": float("nan")}},
        "d": None,
    }
    monkeypatch.setattr(module, "results_of", lambda run_: found[run_])

    def ordered(by: str | None) -> tuple[str, str]:
        table = tabled({name: name for name in found}, {name: {} for name in found}, {}, by)  # type: ignore[misc]
        return "".join(row.name for row in table.rows), table.by

    assert ordered(None) == ("bacd", "accuracy")
    assert ordered("loss") == ("abcd", "loss")
    monkeypatch.setitem(found["a"], "held_out_loss", 3.0)  # type: ignore[arg-type]
    monkeypatch.setitem(found["b"], "held_out_loss", 2.0)  # type: ignore[arg-type]
    assert ordered(None) == ("bacd", "held_out_loss")
    assert Row("d", {}).number("loss") is None


def test_a_cluster_needs_its_package(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match="pip install ray"):
        carry_out(sweep_of(declared, on="ray"), declaring(declared))
    assert not Path(declared.out).exists()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one process."""
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    ray = pytest.importorskip("ray")
    paths = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_leaves_the_same(ray: Any, declared: Run, tmp_path: Path) -> None:
    over = {"method.rank": [2, 99], "train.seed": [0, 1]}
    there = carry_out(sweep_of(declared, over, on="ray", at_once=2), declaring(declared))
    here = carry_out(sweep_of(declared, over, out=str(tmp_path / "here")), declaring(declared))
    assert {row.name: row.error for row in there.rows} == {row.name: row.error for row in here.rows}
    for row in here.rows:
        if row.results:
            same_folders(Path(declared.out) / row.name, tmp_path / "here" / row.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_reaches_the_cluster(ray: Any, declared: Run) -> None:
    declared = replace(declared, train=Train(steps=100_000, batch_size=4))
    steps = [Path(declared.out) / name / "metrics.jsonl" for name in ("seed=0", "seed=1")]

    def press() -> None:
        while not all(path.exists() for path in steps):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(Interrupted, match="the runs on the cluster with it"):
        carry_out(sweep_of(declared, {"train.seed": [0, 1]}, on="ray"), declaring(declared))
    for name in ("seed=0", "seed=1"):
        assert list((Path(declared.out) / name / "checkpoints").iterdir())
