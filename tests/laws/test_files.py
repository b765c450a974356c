"""Saving and loading is the identity; files are deterministic, atomic and strictly read."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.core import atomic, files
from lorakit.core.experts import shape_of
from lorakit.core.state import adapter_tensors
from lorakit.errors import BadAdapterFile, LorakitError, NeverActed
from tests.laws.cases import METHODS, adapted, bits, close, every_case, every_dtype, output, same_bits, scramble
from tests.tiny import tiny

TENSORS = "adapter_model.safetensors"


@torch.no_grad()  # a kernel may be chosen by whether gradients are wanted
@every_case
@every_dtype
def test_save_and_load_are_the_identity(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(family, method, dtype)
    expected, tensors = output(model), adapter_tensors(model, "a")
    lk.save(model, "a", tmp_path / "one")
    other = tiny(family, dtype)
    generator = torch.random.get_rng_state()
    assert lk.load(other, tmp_path / "one") == "one"
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.equal(output(other), expected)
    for key, value in adapter_tensors(other, "one").items():
        assert torch.equal(value, tensors[key]), key
    assert lk.parameters(other) == []  # loaded adapters are frozen
    lk.save(other, "one", tmp_path / "two")
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_saving_while_merged_writes_the_same_bytes(tmp_path: Path) -> None:
    model = adapted("gpt2", "lora-linear")
    lk.save(model, "a", tmp_path / "before")
    lk.merge(model, "a")
    lk.save(model, "a", tmp_path / "merged")
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_a_loaded_adapter_can_be_trained_further(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    lk.load(model, tmp_path / "a", "again", trainable=True)
    assert len(lk.parameters(model, "again")) == len(lk.parameters(model, "a"))


def test_the_bytes_are_equal_across_processes_and_hold_no_paths(tmp_path: Path) -> None:
    script = (
        "import sys, torch, lorakit as lk; from tests.laws.cases import adapted;"
        "torch.manual_seed(3); lk.save(adapted('gpt2', 'lora-ranks'), 'a', sys.argv[1])"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], env=environment, check=True)
    for name in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "1" / name).read_bytes()


def test_no_copy_of_the_base_is_written(tmp_path: Path) -> None:
    model = adapted("llama", "lora-embed")
    lk.save(model, "a", tmp_path / "a")
    assert all("lora_" in key for key in load_file(tmp_path / "a" / TENSORS))


def _break(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    with files.safe_open(folder / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata=metadata)


def test_every_fault_is_listed_and_nothing_is_attached(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    one, two, *_ = sorted(load_file(tmp_path / "a" / TENSORS))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[one]
        tensors[two] = torch.zeros(3, 3)
        tensors["base_model.model.extra.weight"] = torch.zeros(2)

    _break(tmp_path / "a", change)
    other = tiny("llama")
    before = bits(other)
    with pytest.raises(BadAdapterFile) as caught:
        lk.load(other, tmp_path / "a")
    told = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "is missing" in told and "(3, 3)" in told and "extra.weight is not part of it" in told
    assert same_bits(bits(other), before)
    assert not any(module._forward_hooks for module in other.modules())
    with pytest.raises(LorakitError):
        lk.summary(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    _break(tmp_path / "a", lambda tensors: next(iter(tensors.values())).fill_(value))
    with pytest.raises(BadAdapterFile, match="not finite"):
        lk.load(tiny("llama"), tmp_path / "a")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    (tmp_path / "a" / TENSORS).write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    with pytest.raises(BadAdapterFile, match="damaged"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_another_base_is_refused_unless_asked_for(tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    other = tiny("llama", seed=1)
    with pytest.raises(BadAdapterFile, match="another base: 4 of 4"):
        lk.load(other, tmp_path / "a")
    lk.load(other, tmp_path / "a", any_base=True)
    lk.load(tiny("llama", torch.bfloat16), tmp_path / "a")  # the same base, rounded
    with pytest.raises(BadAdapterFile, match="shape"):
        lk.load(tiny("llama", hidden_size=16), tmp_path / "a")
    with pytest.raises(BadAdapterFile, match="no layer"):
        lk.load(tiny("gpt2"), tmp_path / "a")


def test_pickles_newer_formats_and_wrong_folders_are_refused_in_a_sentence(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    with pytest.raises(BadAdapterFile, match="no such folder"):
        lk.load(model, tmp_path / "nowhere")
    (tmp_path / "pickle").mkdir()
    torch.save({"q.lora_A.weight": Path("x")}, tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(BadAdapterFile, match=r"pickle that wants to call .*Path, which is no tensor"):
        lk.load(model, tmp_path / "pickle")
    lk.save(model, "a", tmp_path / "outer" / "a")
    with pytest.raises(BadAdapterFile, match="its folders a"):
        lk.load(model, tmp_path / "outer")
    raw = (tmp_path / "outer" / "a" / TENSORS).read_bytes()
    (tmp_path / "outer" / "a" / TENSORS).write_bytes(
        raw.replace(b'{\\"base', b'{\\"base').replace(b'\\"format\\":1', b'\\"format\\":9')
    )
    with pytest.raises(BadAdapterFile, match="newer lorakit"):
        lk.load(model, tmp_path / "outer" / "a")


def test_the_header_is_plain_safetensors(tmp_path: Path) -> None:
    lk.save(adapted("bert", "lora-linear"), "a", tmp_path / "a")
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    told = json.loads(header["__metadata__"]["lorakit"])
    assert told["method"]["name"] == "lora"
    assert {entry["path"] for entry in told["plan"]} == set(told["base"]["samples"])


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    scramble(model, "a", seed=7)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    for folder in ("a", "new"):
        with pytest.raises(LorakitError, match="disk is full"):
            lk.save(model, "a", tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_delta_that_never_acted_is_an_error_at_save(tmp_path: Path) -> None:
    model = tiny("bert")
    model.add_module("spare", torch.nn.Linear(4, 4))
    lk.attach(model, lk.LoRA(rank=2, targets=("attn.q", "spare")))
    lk.save(model, "default", tmp_path / "fresh")  # nothing has run yet: nothing to report
    output(model)
    assert "1 layers have not acted yet, first spare" in str(lk.summary(model))
    with pytest.raises(NeverActed, match="spare"):
        lk.save(model, "default", tmp_path / "a")


def _rewritten(folder: Path, change) -> None:
    """The folder again, with another header."""
    with files.safe_open(folder / TENSORS, framework="pt") as file:
        header = change(json.loads(file.metadata()["lorakit"]))
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"lorakit": json.dumps(header)})


def _with(*place: str | int, **values: object):
    """A change of a header: the entries `values` of what is found at `place`; those set to ... are taken out."""

    def change(header: dict) -> dict:
        found = header
        for step in place:
            found = found[step]
        found.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del found[key]
        return header

    return change


SAMPLE = ("base", "samples", "transformer.h.0.attn.c_attn")
HOSTILE = {
    "no object": (lambda _: [1], "header is not a JSON object"),
    "null": (lambda _: None, "header is not a JSON object"),
    "no plan": (_with(plan=...), "has no plan"),
    "no method": (_with(method=...), "has no method"),
    "no base": (_with(base=...), "has no base"),
    "plan no list": (_with(plan={}), "bad plan"),
    "format text": (_with(format="1"), "bad format"),
    "format true": (_with(format=True), "bad format"),
    "format 0": (_with(format=0), "bad format"),
    "format huge": (_with(format=10**30), "newer lorakit"),
    "method unknown": (_with("method", name="nothing"), "nothing called 'nothing'"),
    "method no text": (_with("method", name=["lora"]), "method"),
    "method field": (_with("method", colour=3), "unknown entry 'colour'"),
    "method type": (_with("method", rank="8"), "bad rank: '8'"),
    "method value": (_with("method", dropout=3.0), "dropout"),
    "method nan": (_with("method", alpha=float("nan")), "bad alpha: nan"),
    "method table": (_with("method", ranks={"attn.q": "x"}), "bad ranks"),
    "entry no object": (lambda header: header | {"plan": [3]}, "entry 1 of its plan is not a JSON object"),
    "entry key": (_with("plan", 0, colour=1), "unknown entry 'colour'"),
    "entry short": (_with("plan", 0, path=...), "has no path"),
    "entry path": (_with("plan", 0, path=3), "bad path: 3"),
    "entry nowhere": (_with("plan", 0, path="h.9"), "no layer h.9"),
    "entry root": (_with("plan", 0, path=""), "no layer"),
    "entry kind": (_with("plan", 0, kind="other"), "bad kind: 'other'"),
    "entry role": (_with("plan", 0, role="keys"), "role 'keys'"),
    "entry twice": (lambda header: header | {"plan": header["plan"] + header["plan"][:1]}, "repeats attn.q"),
    "rank huge": (_with("plan", 0, rank=10**13), "bad rank"),
    "rank large": (_with("plan", 0, rank=2**30), "has shape"),
    "rank other": (_with("plan", 0, rank=3), "has shape"),
    "rank 0": (_with("plan", 0, rank=0), "the rank 0"),
    "rank negative": (_with("plan", 0, rank=-1), "rank -1"),
    "rank true": (_with("plan", 0, rank=True), "bad rank: True"),
    "rank fraction": (_with("plan", 0, rank=8.5), "bad rank: 8.5"),
    "scale nan": (_with("plan", 0, scale=float("nan")), "bad scale: nan"),
    "scale infinite": (_with("plan", 0, scale=float("inf")), "bad scale: inf"),
    "alpha huge": (_with("plan", 0, alpha=10**400), "bad alpha"),
    "alpha text": (_with("plan", 0, alpha="x"), "bad alpha: 'x'"),
    "init": (_with("plan", 0, init="nothing"), "nothing called 'nothing'"),
    "slice outside": (_with("plan", 0, slice=[80, 32, 96, 1]), "no slice (80, 32, 96, 1)"),
    "slice wide": (_with("plan", 0, slice=[0, 32, 10**6, 1]), "no slice"),
    "slice negative": (_with("plan", 0, slice=[-32, 32, 96, 1]), "no slice"),
    "slice short": (_with("plan", 0, slice=[0, 32]), "bad slice"),
    "slice text": (_with("plan", 0, slice="abcd"), "bad slice"),
    "bias of none": (_with("plan", 0, kind="bias", slice=None, path="transformer.wte", rank=0), "has no bias"),
    "module of none": (_with("plan", 0, kind="module", slice=None, path="transformer.h", rank=0), "no numbers"),
    "labels": (_with("base", labels=10**9), "labels"),
    "architecture": (_with("base", architecture=["x"]), "bad architecture"),
    "sample no object": (_with("base", "samples", x=1), "sample of x is not a JSON object"),
    "sample shape": (_with(*SAMPLE, shape="x"), "bad shape"),
    "sample size": (_with(*SAMPLE, bf16="AAAA"), "c_attn is damaged"),
    "sample letters": (_with(*SAMPLE, bf16="?"), "c_attn is damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_makes_no_sense_is_refused_before_memory_is_taken(case: str, tmp_path: Path) -> None:
    change, words = HOSTILE[case]
    lk.save(adapted("gpt2", "lora"), "a", tmp_path / "a")
    _rewritten(tmp_path / "a", change)
    model = tiny("gpt2")
    with pytest.raises(BadAdapterFile) as caught:
        lk.load(model, tmp_path / "a")
    assert words in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_faults_of_a_header_come_together(tmp_path: Path) -> None:
    lk.save(adapted("gpt2", "lora"), "a", tmp_path / "a")
    _rewritten(tmp_path / "a", lambda header: _with("method", rank="x")(_with("plan", 0, scale="y")(header)))
    with pytest.raises(BadAdapterFile) as caught:
        lk.load(tiny("gpt2"), tmp_path / "a")
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    lk.save(adapted("gpt2", "lora"), "a", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadAdapterFile):
        lk.load(tiny("gpt2"), tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_tensors_of_any_real_dtype_load(dtype: torch.dtype, tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    _break(tmp_path / "a", lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    model = tiny("llama")
    lk.load(model, tmp_path / "a")
    assert all(value.dtype == torch.float32 for value in adapter_tensors(model, "a").values())


@pytest.mark.parametrize("value", [torch.full((2,), 1e300, dtype=torch.float64), torch.ones(2, dtype=torch.complex64)])
def test_numbers_that_float32_cannot_hold_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    _break(tmp_path / "a", lambda tensors: tensors.update(extra=value))
    with pytest.raises(BadAdapterFile, match="not finite"):
        lk.load(tiny("llama"), tmp_path / "a")


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    lk.save(adapted("llama", "lora"), "a", tmp_path / "a")
    key = next(iter(load_file(tmp_path / "a" / TENSORS)))
    _break(tmp_path / "a", lambda tensors: tensors.update({key.removeprefix(files.PREFIX): tensors[key] + 1}))
    with pytest.raises(BadAdapterFile, match="twice"):
        lk.load(tiny("llama"), tmp_path / "a")


@pytest.mark.parametrize("method", METHODS)
def test_a_slice_in_a_header_is_refused_or_acts(method: str, tmp_path: Path) -> None:
    lk.save(adapted("gpt2", method), "a", tmp_path)
    other = tiny("gpt2")

    def cut(header: dict) -> dict:
        for entry in header["plan"]:
            shape = shape_of(other.get_submodule(entry["path"]), "weight")
            if shape is not None and entry["kind"] != "module":
                entry["slice"] = [0, 8, shape[-2], 1]
        return header

    _rewritten(tmp_path, cut)
    try:
        lk.load(other, tmp_path, "a")
    except BadAdapterFile:
        assert not any(module._forward_hooks for module in other.modules())
    else:
        output(other)


def test_slices_of_alpha_0_survive(tmp_path: Path) -> None:
    for zero in ("attn.q", "attn.v"):
        model = tiny("gpt2")
        lk.attach(model, lk.LoRA(rank=2, alphas={zero: 0.0}), name="a")
        scramble(model, "a")
        lk.save(model, "a", tmp_path / zero)
        ours, plain = tiny("gpt2"), tiny("gpt2")
        lk.load(ours, tmp_path / zero)
        save_file(load_file(tmp_path / zero / TENSORS), tmp_path / zero / TENSORS)  # without our header
        lk.load(plain, tmp_path / zero)
        assert close(output(ours), output(model)) and close(output(plain), output(model))


def test_files_of_an_existing_folder_are_replaced_in_order_and_a_failure_names_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama", "lora")
    lk.save(model, "a", tmp_path / "a")
    replace, replaced = os.replace, []

    def failing(source: Path, target: Path) -> None:
        if replaced:
            raise OSError(errno.EIO, "Input/output error")
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises(LorakitError, match=f"{TENSORS} may be new there, all else is as it was"):
        lk.save(model, "a", tmp_path / "a")
    assert replaced == [TENSORS]


def test_a_new_folder_is_not_blamed_for_what_its_caller_could_not_read(tmp_path: Path) -> None:
    def fill(error: OSError, folder: Path) -> None:
        with atomic.new_folder(folder) as temporary:
            error.filename = error.filename and str(error.filename).format(temporary)
            raise error

    for elsewhere in (OSError(errno.EACCES, "Permission denied", "/elsewhere/x"), OSError(errno.EIO, "Bad disk")):
        with pytest.raises(OSError, match=elsewhere.strerror):
            fill(elsewhere, tmp_path / "out")
    for ours in (OSError(errno.ENOSPC, "No space"), OSError(errno.EACCES, "Permission denied", "{}/x")):
        with pytest.raises(LorakitError, match=r"could not be written: .*; nothing was changed there"):
            fill(ours, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
